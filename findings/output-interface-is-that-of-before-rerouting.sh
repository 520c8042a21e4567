#!/usr/bin/env bash
# nftables: in the output hook, a packet that a route chain has routed anew still matches `oifname` of its old interface.
#
# Seen with nftables 1.0.6-2+deb12u2 and iproute2 6.1.0-3 of Debian 12 on Linux 6.18: a chain of `type route` sets a mark, the packet is routed by it to another
# interface, and a later chain of the same hook is asked for `oifname`: it sees the interface of the first routing. The new one
# shows first in postrouting. A guard in the output hook that is meant for packets that were not routed away refuses those that were.
set -euo pipefail
[[ $EUID -eq 0 ]] || { echo "run as root: it makes a network namespace" >&2; exit 2; }
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get download -qq nftables=1.0.6-2+deb12u2 libnftables1=1.0.6-2+deb12u2 iproute2=6.1.0-3
for package in *.deb; do dpkg -x "$package" .; done
export IP="$work/bin/ip" NFT="$work/usr/sbin/nft"
export LD_LIBRARY_PATH="$work/usr/lib/x86_64-linux-gnu"
unshare --net bash -euc '
    $IP link set lo up
    $IP link add eth0 type veth peer name far
    $IP link set far up
    $IP address add 198.51.100.2/24 dev eth0
    $IP link set eth0 up
    $IP rule add fwmark 1 lookup 7 priority 10
    $IP route add local default dev lo table 7
    $NFT -f - <<RULES
table inet t {
        chain first { type route hook output priority -150; meta l4proto tcp mark set 1; }
        chain later { type filter hook output priority 0;
            meta l4proto tcp oifname eth0 counter; meta l4proto tcp oifname lo counter; }
        chain post { type filter hook postrouting priority 0;
            meta l4proto tcp oifname eth0 counter; meta l4proto tcp oifname lo counter; }
    }
RULES
    (exec 3<>/dev/tcp/198.51.100.9/80) 2>/dev/null || true
    seen() { $NFT list chain inet t $1 | grep "oifname \"$2\"" | sed "s/.*packets \([0-9]*\).*/\1/"; }
    echo "output: eth0 $(seen later eth0), lo $(seen later lo); postrouting: eth0 $(seen post eth0), lo $(seen post lo) packets"
    [[ $(seen later eth0) -gt 0 && $(seen later lo) -eq 0 && $(seen post eth0) -eq 0 && $(seen post lo) -gt 0 ]]
'
echo "as described"
