//! The network between the machines: a bridge in a namespace of its own.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    process::Command,
};

use anyhow::{Context, bail};
use hauberk_linux::{
    Netns, links,
    packets::{CaptureOptions, Interface, PacketCapture},
};

/// The number of the control plane's machine in the network.
pub const CONTROL: u8 = 1;
/// The number of `node-a`; also that of its pods' networks.
pub const NODE_A: u8 = 2;
/// The number of `node-b`; also that of its pods' networks.
pub const NODE_B: u8 = 3;
/// The number of a machine that is not in the cluster, but has routes to its pods.
pub const OUTSIDE: u8 = 99;

/// The number of the bridge itself, where the default routes end.
const GATEWAY: u8 = 254;

const BRIDGE: &str = "wire";

/// All pods' addresses, IPv4 and IPv6.
pub(crate) const POD_NETWORKS: &str = "10.244.0.0/16,fd00:10:244::/48";
/// All services' addresses, IPv4 and IPv6.
pub(crate) const SERVICE_NETWORKS: &str = "10.96.0.0/16,fd00:10:96::/112";
/// The service of the DNS server.
pub(crate) const DNS_SERVICE: &str = "10.96.0.10";

/// A machine's address.
#[must_use]
pub fn ipv4(number: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, 88, 0, number))
}

/// A machine's IPv6 address.
#[must_use]
pub fn ipv6(number: u8) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(0xfd88, 0, 0, 0, 0, 0, 0, number.into()))
}

/// The networks of a node's pods, each with its prefix length.
pub(crate) fn pod_networks(number: u8) -> [(IpAddr, u8); 2] {
    [
        (IpAddr::V4(Ipv4Addr::new(10, 244, number, 0)), 24),
        (IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x244, number.into(), 0, 0, 0, 0)), 64),
    ]
}

/// The bridge.
pub struct Wire {
    netns: Netns,
}

impl Wire {
    /// A bridge with nothing on it.
    pub(crate) fn create() -> anyhow::Result<Self> {
        let netns = Netns::create().context("make the wire's namespace")?;
        netns.run(|| {
            links::create_bridge(BRIDGE)?;
            links::add_address(BRIDGE, ipv4(GATEWAY), 24)?;
            links::add_address(BRIDGE, ipv6(GATEWAY), 64)?;
            links::set_up(BRIDGE)
        })??;
        Ok(Self { netns })
    }

    /// The namespace of the bridge.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// A new namespace for a machine, joined to the bridge by a link that has the machine's name on
    /// the bridge's side and is `eth0` on the other. One of the same name is unplugged.
    pub(crate) fn plug(&self, name: &str, number: u8) -> anyhow::Result<Netns> {
        let machine = Netns::create().context("make a machine's namespace")?;
        let peer = machine.clone();
        self.netns.run(|| {
            // The kernel removes a dead namespace's links when it finds the time.
            if links::if_index(name).is_ok() {
                links::delete(name)?;
            }
            links::create_veth(name, "eth0", &peer)?;
            links::attach(name, BRIDGE)?;
            links::set_up(name)
        })??;
        machine.run(|| -> anyhow::Result<()> {
            // The same after every boot: the others remember it.
            ip(&["link", "set", "eth0", "address", &format!("0a:88:00:00:00:{number:02x}")])?;
            links::add_address("eth0", ipv4(number), 24)?;
            links::add_address("eth0", ipv6(number), 64)?;
            links::set_up("eth0")?;
            for path in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
                links::sysctl(path, "1")?;
            }
            for node in [NODE_A, NODE_B] {
                if node == number {
                    continue;
                }
                let [(network, prefix), (network6, prefix6)] = pod_networks(node);
                links::add_route(network, prefix, ipv4(node))?;
                links::add_route(network6, prefix6, ipv6(node))?;
            }
            // Without one, nothing is sent to the services' addresses.
            links::add_default_route(ipv4(GATEWAY))?;
            links::add_default_route(ipv6(GATEWAY))?;
            Ok(())
        })??;
        Ok(machine)
    }

    /// Takes a machine off the bridge, for good.
    pub(crate) fn unplug(&self, name: &str) -> anyhow::Result<()> {
        self.netns.run(|| links::if_index(name).is_err() || links::delete(name).is_ok())?;
        Ok(())
    }

    /// Cuts a machine's link: nothing gets through any more, and nobody is told of it.
    ///
    /// # Errors
    /// If there is no such machine.
    pub fn cut(&self, machine: &str) -> anyhow::Result<()> {
        self.netns.run(|| ip(&["link", "set", machine, "down"]))?
    }

    /// Undoes [`Self::cut`].
    ///
    /// # Errors
    /// If there is no such machine.
    pub fn mend(&self, machine: &str) -> anyhow::Result<()> {
        self.netns.run(|| ip(&["link", "set", machine, "up"]))?
    }

    /// Starts to capture what crosses a machine's link, in both directions.
    ///
    /// # Errors
    /// If there is no such machine.
    pub fn capture(&self, machine: &str) -> anyhow::Result<PacketCapture> {
        let interface = Interface::Named(machine.to_owned());
        let options = CaptureOptions { interface, ..CaptureOptions::default() };
        Ok(self.netns.run(|| PacketCapture::start(&options))??)
    }
}

fn ip(arguments: &[&str]) -> anyhow::Result<()> {
    let output = Command::new("ip").args(arguments).output().context("run ip")?;
    if !output.status.success() {
        bail!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
