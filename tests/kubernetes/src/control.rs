//! The control plane's machine: etcd, the API server, the controllers, the scheduler, DNS.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::{
    certificates::{Authority, PKI, Subject, rights, signing_key},
    machine::Machine,
    wire::{CONTROL, DNS_SERVICE, POD_NETWORKS, SERVICE_NETWORKS, ipv4, ipv6},
};

/// Who issues the service accounts' tokens, and their audience unless another is asked for.
pub(crate) const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";

/// What makes certificates: the program, and its user.
pub(crate) const CERT_MANAGER: &str = "cert-manager";

/// What the machine answers to, whoever asks.
pub(crate) fn server() -> String {
    format!("https://{}:6443", ipv4(CONTROL))
}

/// Writes all that the control plane needs to its disk.
pub(crate) fn prepare(
    control: &Machine,
    authority: &Authority,
    front_proxy: &Authority,
) -> anyhow::Result<()> {
    let pki = control.disk(PKI);
    std::fs::copy(authority.certificate(), pki.join("ca.crt"))?;
    std::fs::copy(authority.key(), pki.join("ca.key"))?;
    std::fs::copy(front_proxy.certificate(), pki.join("front-proxy-ca.crt"))?;
    signing_key(&pki.join("service-accounts"))?;

    let first_of_services = [
        IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1)),
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 1)),
    ];
    let [service, service6] = first_of_services;
    let addresses = [ipv4(CONTROL), ipv6(CONTROL), service, service6, Ipv4Addr::LOCALHOST.into()];
    let names = [
        "localhost",
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
    ];
    authority.issue(
        &pki.join("api-server"),
        Subject { name: "kube-apiserver", group: "", addresses: &addresses, names: &names },
    )?;
    let clients = [
        ("kubelet-client", "kube-apiserver-kubelet-client", "system:masters"),
        ("controllers", "system:kube-controller-manager", ""),
        ("scheduler", "system:kube-scheduler", ""),
        ("dns", "system:coredns", ""),
        (CERT_MANAGER, CERT_MANAGER, ""),
    ];
    authority.introduce(control, &clients)?;
    front_proxy.issue(&pki.join("front-proxy"), Subject::client("front-proxy", ""))?;
    control.write("/etc/kubernetes/Corefile", COREFILE)
}

/// `errors` and `log` of a test's cluster are for its log file; names of the world outside do not
/// exist.
const COREFILE: &str = ".:53 {
    errors
    health :8181
    ready :8182
    kubernetes cluster.local in-addr.arpa ip6.arpa {
        kubeconfig /etc/kubernetes/dns.conf
        pods insecure
        ttl 5
    }
    cache 5
}
";

/// Starts the store.
pub(crate) fn start_etcd(control: &Machine) -> anyhow::Result<()> {
    let mut arguments = words(&["etcd", "--name=etcd", "--data-dir=/run/etcd"]);
    for option in ["listen-client-urls", "advertise-client-urls"] {
        arguments.push(format!("--{option}=http://127.0.0.1:2379"));
    }
    for option in ["listen-peer-urls", "initial-advertise-peer-urls"] {
        arguments.push(format!("--{option}=http://127.0.0.1:2380"));
    }
    arguments.push("--initial-cluster=etcd=http://127.0.0.1:2380".to_owned());
    control.start("etcd", &arguments)
}

/// Starts the API server.
pub(crate) fn start_api_server(control: &Machine, more: &[String]) -> anyhow::Result<()> {
    let file = |option: &str, name: &str| format!("--{option}={PKI}/{name}");
    let mut arguments = words(&[
        "kube-apiserver",
        "--etcd-servers=http://127.0.0.1:2379",
        "--secure-port=6443",
        "--allow-privileged",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--kubelet-preferred-address-types=InternalIP",
        // Services' addresses are not translated on this machine: webhooks are called at their pods.
        "--enable-aggregator-routing",
        "--profiling=false",
        "--requestheader-allowed-names=front-proxy",
        "--requestheader-username-headers=X-Remote-User",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
    ]);
    arguments.extend([
        format!("--advertise-address={}", ipv4(CONTROL)),
        format!("--service-cluster-ip-range={SERVICE_NETWORKS}"),
        format!("--service-account-issuer={ISSUER}"),
        file("service-account-key-file", "service-accounts.pub"),
        file("service-account-signing-key-file", "service-accounts.key"),
        file("client-ca-file", "ca.crt"),
        file("tls-cert-file", "api-server.crt"),
        file("tls-private-key-file", "api-server.key"),
        file("kubelet-certificate-authority", "ca.crt"),
        file("kubelet-client-certificate", "kubelet-client.crt"),
        file("kubelet-client-key", "kubelet-client.key"),
        file("requestheader-client-ca-file", "front-proxy-ca.crt"),
        file("proxy-client-cert-file", "front-proxy.crt"),
        file("proxy-client-key-file", "front-proxy.key"),
    ]);
    arguments.extend_from_slice(more);
    control.start("api-server", &arguments)
}

/// Starts what needs the API server.
pub(crate) fn start_controllers(control: &Machine, more: &[String]) -> anyhow::Result<()> {
    let conf = |option: &str, name: &str| format!("--{option}=/etc/kubernetes/{name}.conf");
    let mut arguments = words(&[
        "kube-controller-manager",
        "--leader-elect=false",
        "--use-service-account-credentials",
        "--profiling=false",
        // The nodes' networks are given, as the routes between them are.
        "--allocate-node-cidrs=false",
        "--flex-volume-plugin-dir=/var/lib/volume-plugins",
    ]);
    arguments.extend([
        format!("--cluster-cidr={POD_NETWORKS}"),
        format!("--service-cluster-ip-range={SERVICE_NETWORKS}"),
        conf("kubeconfig", "controllers"),
        conf("authentication-kubeconfig", "controllers"),
        conf("authorization-kubeconfig", "controllers"),
        format!("--root-ca-file={PKI}/ca.crt"),
        format!("--service-account-private-key-file={PKI}/service-accounts.key"),
        format!("--cluster-signing-cert-file={PKI}/ca.crt"),
        format!("--cluster-signing-key-file={PKI}/ca.key"),
    ]);
    arguments.extend_from_slice(more);
    control.start("controller-manager", &arguments)?;

    let mut arguments = words(&["kube-scheduler", "--leader-elect=false", "--profiling=false"]);
    arguments.extend([
        conf("kubeconfig", "scheduler"),
        conf("authentication-kubeconfig", "scheduler"),
        conf("authorization-kubeconfig", "scheduler"),
    ]);
    control.start("scheduler", &arguments)?;
    control.start("dns", &words(&["coredns", "-conf", "/etc/kubernetes/Corefile"]))
}

/// The DNS server's rights, and its service as pods expect it. The server itself is no pod.
pub(crate) fn manifests() -> String {
    let rights = rights(
        "system:coredns",
        "- apiGroups: ['']
  resources: [endpoints, services, pods, namespaces]
  verbs: [list, watch]
- apiGroups: [discovery.k8s.io]
  resources: [endpointslices]
  verbs: [list, watch]
",
    );
    format!(
        "{rights}---
apiVersion: v1
kind: Service
metadata: {{name: kube-dns, namespace: kube-system, labels: {{k8s-app: kube-dns}}}}
spec:
  clusterIP: {DNS_SERVICE}
  ports:
  - {{name: dns, port: 53, protocol: UDP}}
  - {{name: dns-tcp, port: 53, protocol: TCP}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: kube-dns-control
  namespace: kube-system
  labels:
    kubernetes.io/service-name: kube-dns
    endpointslice.kubernetes.io/managed-by: hauberk-tests
addressType: IPv4
endpoints:
- addresses: ['{}']
  conditions: {{ready: true}}
ports:
- {{name: dns, port: 53, protocol: UDP}}
- {{name: dns-tcp, port: 53, protocol: TCP}}
",
        ipv4(CONTROL)
    )
}

/// What cert-manager may, of what its own chart lets it.
pub(crate) fn cert_manager_rights() -> String {
    rights(
        CERT_MANAGER,
        "- apiGroups: [cert-manager.io]
  resources: ['*']
  verbs: [get, list, watch, create, update, patch, delete]
- apiGroups: ['']
  resources: [secrets]
  verbs: [get, list, watch, create, update, patch, delete]
- apiGroups: ['']
  resources: [events]
  verbs: [create, patch]
",
    )
}

/// Starts cert-manager, whose resources the API server must know.
pub(crate) fn start_cert_manager(control: &Machine) -> anyhow::Result<()> {
    let kubeconfig = format!("--kubeconfig=/etc/kubernetes/{CERT_MANAGER}.conf");
    control.start(CERT_MANAGER, &[CERT_MANAGER.to_owned(), kubeconfig])
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}
