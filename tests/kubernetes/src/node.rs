//! A node's machine: containerd, kubelet and kube-proxy, and an engine of NetworkPolicies for who wants one.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use serde_json::json;

use crate::{
    certificates::{Authority, PKI, Subject, rights},
    images::PAUSE,
    machine::Machine,
    wire::{DNS_SERVICE, POD_NETWORKS, SERVICE_NETWORKS, ipv4, ipv6, pod_networks},
};

/// Where the host has the plugins for pods' networks.
pub(crate) const CNI_PLUGINS: &str = "/usr/lib/cni";

/// How long kubelet may take to answer.
const KUBELET_PATIENCE: Duration = Duration::from_secs(30);

/// The engine of NetworkPolicies: the program, and its user.
const ENGINE: &str = "kube-router";

/// Those that a node has.
pub(crate) const CNI_NAMES: [&str; 4] = ["host-local", "loopback", "portmap", "ptp"];

/// Writes all that a node needs to its disk.
pub(crate) fn prepare(node: &Machine, authority: &Authority) -> anyhow::Result<()> {
    let pki = node.disk(PKI);
    fs::copy(authority.certificate(), pki.join("ca.crt"))?;
    let name = node.name();
    let user = format!("system:node:{name}");
    let clients = [
        ("kubelet", user.as_str(), "system:nodes"),
        ("kube-proxy", "system:kube-proxy", ""),
        (ENGINE, ENGINE, ""),
    ];
    authority.introduce(node, &clients)?;
    let addresses = [ipv4(node.number()), ipv6(node.number())];
    authority.issue(
        &pki.join("kubelet-server"),
        Subject { name: &user, group: "system:nodes", addresses: &addresses, names: &[name] },
    )?;
    node.write("/etc/kubernetes/kubelet.json", &kubelet_configuration())?;
    node.write("/etc/containerd/config.toml", &containerd_configuration())?;
    node.write("/etc/cni/net.d/10-pods.conflist", &network(node.number()))?;
    let plugins = node.disk("/opt/cni/bin");
    fs::create_dir_all(&plugins)?;
    for name in CNI_NAMES {
        let from = Path::new(CNI_PLUGINS).join(name);
        fs::copy(&from, plugins.join(name)).with_context(|| format!("copy {}", from.display()))?;
    }
    for folder in ["/var/lib/kubelet", "/var/lib/containerd", "/etc/kubernetes/manifests"] {
        fs::create_dir_all(node.disk(folder))?;
    }
    Ok(())
}

fn kubelet_configuration() -> String {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": format!("{PKI}/ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": format!("{PKI}/kubelet-server.crt"),
        "tlsPrivateKeyFile": format!("{PKI}/kubelet-server.key"),
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "staticPodPath": "/etc/kubernetes/manifests",
        "volumePluginDir": "/var/lib/volume-plugins",
        "resolvConf": "/etc/resolv.conf",
        "clusterDNS": [DNS_SERVICE],
        "clusterDomain": "cluster.local",
        "cgroupDriver": "cgroupfs",
        // Not every machine with tests has them, and no test is about them.
        "failSwapOn": false,
        "failCgroupV1": false,
        "makeIPTablesUtilChains": false,
        "oomScoreAdj": 0,
        // The disk and the memory are the host's: full enough, kubelet would drive the pods away.
        "enforceNodeAllocatable": [],
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "evictionHard": {
            "memory.available": "1%",
            "nodefs.available": "1%",
            "nodefs.inodesFree": "1%",
            "imagefs.available": "1%",
        },
    })
    .to_string()
}

fn containerd_configuration() -> String {
    format!(
        r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
address = "/run/containerd/containerd.sock"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
# A process without CAP_SYS_RESOURCE cannot make itself less likely to be killed.
restrict_oom_score_adj = true
# Its profiles are the whole host's.
disable_apparmor = true

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/opt/cni/bin"
conf_dir = "/etc/cni/net.d"

[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
default_runtime_name = "runc"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = false
"#
    )
}

/// A link a pod and no bridge: on a bridge, the answer of a service's pod on the same node would go
/// straight to the caller, past the translation of addresses.
fn network(number: u8) -> String {
    let [(network, prefix), (network6, prefix6)] = pod_networks(number);
    let list = json!({
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [
            {
                "type": "ptp",
                "mtu": 1500,
                "ipam": {
                    "type": "host-local",
                    "dataDir": "/run/cni",
                    "ranges": [
                        [{"subnet": format!("{network}/{prefix}")}],
                        [{"subnet": format!("{network6}/{prefix6}")}],
                    ],
                    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    });
    format!("{list:#}")
}

/// Starts what runs the containers.
pub(crate) fn start_containerd(node: &Machine) -> anyhow::Result<()> {
    let arguments = ["containerd", "--config", "/etc/containerd/config.toml"];
    node.start("containerd", &arguments.map(str::to_owned))
}

/// Starts the node's agent and waits until it answers. It ends when containerd is not ready yet; a
/// service manager would start it again, and so does this.
pub(crate) fn start_kubelet(node: &Machine) -> anyhow::Result<()> {
    let health = SocketAddr::from((Ipv4Addr::LOCALHOST, 10248));
    let deadline = Instant::now() + KUBELET_PATIENCE;
    spawn_kubelet(node)?;
    while node.run(|| TcpStream::connect_timeout(&health, Duration::from_secs(1)))?.is_err() {
        if Instant::now() > deadline {
            bail!("kubelet does not answer\n{}", node.log_end("kubelet"));
        }
        thread::sleep(Duration::from_millis(100));
        if !node.runs("kubelet")? {
            spawn_kubelet(node)?;
        }
    }
    Ok(())
}

fn spawn_kubelet(node: &Machine) -> anyhow::Result<()> {
    let (address, address6) = (ipv4(node.number()), ipv6(node.number()));
    let arguments = [
        "kubelet".to_owned(),
        "--config=/etc/kubernetes/kubelet.json".to_owned(),
        "--kubeconfig=/etc/kubernetes/kubelet.conf".to_owned(),
        format!("--hostname-override={}", node.name()),
        format!("--node-ip={address},{address6}"),
    ];
    node.start("kubelet", &arguments)
}

/// Starts what translates services' addresses.
pub(crate) fn start_proxy(node: &Machine) -> anyhow::Result<()> {
    let arguments = [
        "kube-proxy".to_owned(),
        "--kubeconfig=/etc/kubernetes/kube-proxy.conf".to_owned(),
        "--proxy-mode=nftables".to_owned(),
        format!("--cluster-cidr={POD_NETWORKS}"),
        format!("--hostname-override={}", node.name()),
        // These limits are the whole host's.
        "--conntrack-max-per-core=0".to_owned(),
        "--conntrack-tcp-timeout-established=0".to_owned(),
        "--conntrack-tcp-timeout-close-wait=0".to_owned(),
        "--oom-score-adj=0".to_owned(),
    ];
    node.start("kube-proxy", &arguments)
}

/// What the engine of NetworkPolicies may read.
pub(crate) fn engine_rights() -> String {
    rights(
        ENGINE,
        "- apiGroups: ['']
  resources: [namespaces, pods, services, nodes, endpoints]
  verbs: [get, list, watch]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch]
- apiGroups: [discovery.k8s.io]
  resources: [endpointslices]
  verbs: [get, list, watch]
",
    )
}

/// Starts what enforces NetworkPolicies, and nothing else of it.
pub(crate) fn start_engine(node: &Machine) -> anyhow::Result<()> {
    let arguments = [
        ENGINE.to_owned(),
        format!("--kubeconfig=/etc/kubernetes/{ENGINE}.conf"),
        format!("--hostname-override={}", node.name()),
        "--run-firewall=true".to_owned(),
        "--run-router=false".to_owned(),
        "--run-service-proxy=false".to_owned(),
        "--enable-cni=false".to_owned(),
        "--enable-ipv6=true".to_owned(),
        format!("--service-cluster-ip-range={SERVICE_NETWORKS}"),
        "--health-port=0".to_owned(),
    ];
    node.start(ENGINE, &arguments)
}

/// Stops it and takes its rules away; nobody else has any of iptables.
pub(crate) fn stop_engine(node: &Machine) -> anyhow::Result<()> {
    node.stop(ENGINE)?;
    for program in ["iptables", "ip6tables"] {
        for step in ["-F", "-X"] {
            node.text(&[program, "-w", step])?;
        }
    }
    node.text(&["ipset", "destroy"]).map(drop)
}
