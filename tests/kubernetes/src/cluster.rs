//! The cluster as a whole: starts it, breaks it, takes it down. How to ask it is in `ask.rs`.

use std::{
    ffi::OsStr,
    fs::{self, File},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::Context;
use hauberk_linux::Netns;
use serde_json::json;

use crate::{
    Programs,
    certificates::{Authority, Subject, kubeconfig},
    cgroups, control,
    footprint::Footprint,
    images::{self, Image},
    janitor::Janitor,
    machine::{Machine, succeeded},
    node, requirements,
    wire::{self, CONTROL, NODE_A, NODE_B, OUTSIDE, Wire},
};

/// How long the parts of the control plane may take to answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where a test may ask for the logs to be kept: a folder.
const LOGS_VARIABLE: &str = "HAUBERK_CLUSTER_LOGS";

/// What differs between clusters.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Images that both nodes have from the start, besides [`images::busybox`].
    pub images: Vec<Image>,
    /// More arguments for the API server.
    pub api_server: Vec<String>,
    /// More arguments for the controller manager.
    pub controller_manager: Vec<String>,
}

/// A cluster that runs. Everything of it goes when it is dropped, and when its process is killed.
pub struct Cluster {
    control: Machine,
    nodes: [Machine; 2],
    wire: Wire,
    outside: Netns,
    programs: Programs,
    options: Options,
    folder: PathBuf,
    name: String,
    janitor: Janitor,
}

impl Cluster {
    /// Starts a cluster and waits until both nodes are ready for pods.
    ///
    /// # Errors
    /// If the host lacks something, with all that is missing; or if a part does not start, with the
    /// end of its log.
    pub fn start(options: Options) -> anyhow::Result<Self> {
        let programs = requirements::locate()?;
        let folder = tempfile::Builder::new().prefix("hauberk-kubernetes-").tempdir()?.keep();
        let name = folder.file_name().and_then(OsStr::to_str).context("no folder")?.to_owned();
        let groups = cgroups::cluster_folders(&name)?;
        let janitor = Janitor::start(&folder, &groups)?;
        if let Some(logs) = std::env::var_os(LOGS_VARIABLE) {
            let logs = Path::new(&logs).join(&name);
            fs::create_dir_all(&logs)?;
            std::os::unix::fs::symlink(logs, folder.join("logs"))?;
        }

        let wire = Wire::create()?;
        let outside = wire.plug("outside", OUTSIDE)?;
        let machine =
            |machine, number| Machine::create(&folder, programs.folder(), &name, machine, number);
        let control = machine("control", CONTROL)?;
        let nodes = [machine("node-a", NODE_A)?, machine("node-b", NODE_B)?];
        let cluster =
            Self { control, nodes, wire, outside, programs, options, folder, name, janitor };
        cluster.bring_up()?;
        Ok(cluster)
    }

    fn bring_up(&self) -> anyhow::Result<()> {
        let authority = Authority::create(&self.folder.join("pki"), "kubernetes")?;
        let front_proxy = Authority::create(&self.folder.join("front-proxy"), "front-proxy-ca")?;
        let admin = self.folder.join("pki").join("admin");
        authority.issue(&admin, Subject::client("kubernetes-admin", "system:masters"))?;
        let text = kubeconfig(
            &control::server(),
            &authority.certificate().to_string_lossy(),
            &admin.with_extension("crt").to_string_lossy(),
            &admin.with_extension("key").to_string_lossy(),
        );
        fs::write(self.kubeconfig(), text)?;

        control::prepare(&self.control, &authority, &front_proxy)?;
        self.control.boot(&self.wire)?;
        control::start_etcd(&self.control)?;
        control::start_api_server(&self.control, &self.options.api_server)?;
        for machine in &self.nodes {
            node::prepare(machine, &authority)?;
            machine.boot(&self.wire)?;
            node::start_containerd(machine)?;
        }
        self.import(&images::pause())?;
        self.import(&images::busybox()?)?;
        for image in &self.options.images {
            self.import(image)?;
        }

        self.wait_api_server()?;
        control::start_controllers(&self.control, &self.options.controller_manager)?;
        self.apply(&control::manifests())?;
        self.on_both(|machine| {
            self.register(machine)?;
            node::start_kubelet(machine)?;
            node::start_proxy(machine)
        })?;
        self.wait_until("the nodes", PATIENCE, |cluster| {
            cluster.check_node("node-a")?;
            cluster.check_node("node-b")?;
            // Without it, no pod is let in.
            cluster.kubectl(&["get", "serviceaccount", "default"]).map(|_| ())
        })
    }

    /// Nodes get their pods' networks from an administrator here, not from a controller.
    fn register(&self, machine: &Machine) -> anyhow::Result<()> {
        let networks = wire::pod_networks(machine.number())
            .map(|(network, prefix)| format!("{network}/{prefix}"));
        let [first, _] = &networks;
        let node = json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {
                "name": machine.name(),
                "labels": {"kubernetes.io/hostname": machine.name()},
            },
            "spec": {"podCIDR": first, "podCIDRs": networks},
        });
        self.apply(&node.to_string()).map(|_| ())
    }

    fn wait_api_server(&self) -> anyhow::Result<()> {
        self.wait_until("the API server", PATIENCE, |cluster| {
            cluster.kubectl(&["get", "--raw", "/readyz"]).map(|_| ())
        })
    }

    /// The cluster's own name, which no other cluster of the host has.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its folder, with all that is on the machines' disks and the logs.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// An administrator's access, for programs in the control plane's network: see
    /// [`Self::control_command`].
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.join("admin.conf")
    }

    /// The programs of this Kubernetes.
    #[must_use]
    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// The control plane's machine.
    #[must_use]
    pub fn control(&self) -> &Machine {
        &self.control
    }

    /// A node by its name.
    ///
    /// # Errors
    /// If there is none of this name.
    pub fn node(&self, name: &str) -> anyhow::Result<&Machine> {
        self.nodes
            .iter()
            .find(|node| node.name() == name)
            .with_context(|| format!("the cluster has no node {name}"))
    }

    /// Both nodes.
    #[must_use]
    pub fn nodes(&self) -> &[Machine; 2] {
        &self.nodes
    }

    /// All machines.
    pub(crate) fn machines(&self) -> impl Iterator<Item = &Machine> {
        self.nodes.iter().chain([&self.control])
    }

    /// The network between the machines.
    #[must_use]
    pub fn wire(&self) -> &Wire {
        &self.wire
    }

    /// The network of a machine outside of the cluster, with routes to its pods.
    #[must_use]
    pub fn outside(&self) -> &Netns {
        &self.outside
    }

    /// What the cluster is known by on the host.
    ///
    /// # Errors
    /// If the host's cgroups cannot be read.
    pub fn footprint(&self) -> anyhow::Result<Footprint> {
        let mut namespaces = vec![self.wire.netns().inode(), self.outside.inode()];
        for machine in self.machines() {
            namespaces.extend(machine.namespace_numbers());
        }
        let cgroups = cgroups::cluster_folders(&self.name)?;
        Ok(Footprint { folder: self.folder.clone(), cgroups, namespaces })
    }

    /// Makes an image and gives it to both nodes.
    ///
    /// # Errors
    /// If a file of it is missing, or a node does not take it.
    pub fn import(&self, image: &Image) -> anyhow::Result<()> {
        let archive = image.archive(&self.folder)?;
        let import = |node: &Machine| {
            self.wait_until("the import of an image", PATIENCE, |_| {
                let command = ["ctr", "-n", "k8s.io", "images", "import", "-"];
                let output = node.output_of_file(&command, File::open(&archive)?)?;
                succeeded(&format!("import {} on {}", image.name, node.name()), &output)
            })
        };
        self.on_both(|node| import(node).map(|_| ()))?;
        Ok(fs::remove_file(archive)?)
    }

    fn on_both(&self, act: impl Fn(&Machine) -> anyhow::Result<()> + Sync) -> anyhow::Result<()> {
        thread::scope(|scope| {
            let threads = self.nodes.each_ref().map(|node| scope.spawn(|| act(node)));
            threads.map(|thread| thread.join()).into_iter().try_for_each(|result| match result {
                Ok(result) => result,
                Err(payload) => std::panic::resume_unwind(payload),
            })
        })
    }

    /// Stops a node's kubelet; its pods run on.
    ///
    /// # Errors
    /// If it does not run.
    pub fn stop_kubelet(&self, node: &str) -> anyhow::Result<()> {
        self.node(node)?.stop("kubelet")
    }

    /// Starts a node's kubelet, which must have been stopped.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_kubelet(&self, node: &str) -> anyhow::Result<()> {
        node::start_kubelet(self.node(node)?)
    }

    /// Stops a node's kubelet and starts it again.
    ///
    /// # Errors
    /// If it does not run or does not start.
    pub fn restart_kubelet(&self, node: &str) -> anyhow::Result<()> {
        self.stop_kubelet(node)?;
        self.start_kubelet(node)
    }

    /// Stops a node's container runtime; its pods run on, and no other one starts.
    ///
    /// # Errors
    /// If it does not run.
    pub fn stop_containerd(&self, node: &str) -> anyhow::Result<()> {
        self.node(node)?.stop("containerd")
    }

    /// Starts a node's container runtime, which must have been stopped.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_containerd(&self, node: &str) -> anyhow::Result<()> {
        node::start_containerd(self.node(node)?)
    }

    /// Stops a node's container runtime and starts it again; its pods run on.
    ///
    /// # Errors
    /// If it does not run or does not start.
    pub fn restart_containerd(&self, node: &str) -> anyhow::Result<()> {
        self.stop_containerd(node)?;
        self.start_containerd(node)
    }

    /// Takes a node's power away and gives it back: nothing but its disk is left of it. Does not wait
    /// for the node or its pods.
    ///
    /// # Errors
    /// If it does not come back.
    pub fn reboot_node(&self, node: &str) -> anyhow::Result<()> {
        self.power_off_node(node)?;
        self.power_on_node(node)
    }

    /// The first half of [`Self::reboot_node`].
    ///
    /// # Errors
    /// If something of the node cannot be ended.
    pub fn power_off_node(&self, node: &str) -> anyhow::Result<()> {
        self.node(node)?.switch_off(&self.wire)
    }

    /// The second half of [`Self::reboot_node`].
    ///
    /// # Errors
    /// If a program of it cannot be started.
    pub fn power_on_node(&self, node: &str) -> anyhow::Result<()> {
        let machine = self.node(node)?;
        machine.boot(&self.wire)?;
        node::start_containerd(machine)?;
        node::start_kubelet(machine)?;
        node::start_proxy(machine)
    }

    /// Starts an engine of NetworkPolicies (kube-router) on both nodes; without one, nobody enforces them.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_network_policies(&self) -> anyhow::Result<()> {
        self.apply(&node::engine_rights())?;
        self.on_both(node::start_engine)
    }

    /// Stops it, and takes away what it has set up.
    ///
    /// # Errors
    /// If it does not run, or something of it stays.
    pub fn stop_network_policies(&self) -> anyhow::Result<()> {
        self.on_both(node::stop_engine)
    }

    /// Starts cert-manager, with its custom resources.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_cert_manager(&self) -> anyhow::Result<()> {
        let resources = self.programs.path("cert-manager-crds.yaml");
        let file = format!("--filename={}", resources.display());
        // They are too long for what a client's own apply notes down.
        self.kubectl(&["apply", "--server-side", &file])?;
        self.kubectl(&["wait", "--for=condition=Established", "--timeout=30s", &file])?;
        self.apply(&control::cert_manager_rights())?;
        control::start_cert_manager(&self.control)
    }

    /// Stops it; what it has made stays.
    ///
    /// # Errors
    /// If it does not run.
    pub fn stop_cert_manager(&self) -> anyhow::Result<()> {
        self.control.stop(control::CERT_MANAGER)
    }

    /// Stops the API server.
    ///
    /// # Errors
    /// If it does not run.
    pub fn stop_apiserver(&self) -> anyhow::Result<()> {
        self.control.stop("api-server")
    }

    /// Starts the API server again and waits until it answers.
    ///
    /// # Errors
    /// If it does not.
    pub fn start_apiserver(&self) -> anyhow::Result<()> {
        control::start_api_server(&self.control, &self.options.api_server)?;
        self.wait_api_server()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for machine in self.machines() {
            if let Err(error) = machine.switch_off(&self.wire) {
                eprintln!("switch {} off: {error:#}", machine.name());
            }
        }
        if let Err(error) = self.janitor.clean() {
            eprintln!("{error:#}");
        }
    }
}
