#!/usr/bin/env bash
# nfnetlink_log: what it copies of packets on loopback lacks the TCP checksum, and nothing says so.
#
# Seen with nftables 1.0.6-2+deb12u2 and tcpdump 4.99.3-1 with libpcap 1.10.3-1 of Debian 12 on Linux 6.18: a rule in prerouting logs the first packet of
# a connection to a group, and the copy has in its place the sum of the addresses alone, which the network card would complete, or on
# loopback nobody. nfnetlink_queue tells of that (NFQA_SKB_CSUMNOTREADY) and nfnetlink_log does not. Whoever sends such a copy on has to compute the
# checksum first, or the receiver drops it without a word. A packet whose sender computes it (here: over a veth pair without offloading) is whole.
set -euo pipefail
[[ $EUID -eq 0 ]] || { echo "run as root: it makes network namespaces" >&2; exit 2; }
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get download -qq nftables=1.0.6-2+deb12u2 libnftables1=1.0.6-2+deb12u2 iproute2=6.1.0-3 tcpdump=4.99.3-1 libpcap0.8=1.10.3-1 ethtool=1:6.1-1
for package in *.deb; do dpkg -x "$package" .; done
export IP="$work/bin/ip" NFT="$work/usr/sbin/nft" TCPDUMP="$work/usr/bin/tcpdump" ETHTOOL="$work/sbin/ethtool"
export LD_LIBRARY_PATH="$work/usr/lib/x86_64-linux-gnu"
unshare --net --mount bash -euc '
    mkdir -p /run/netns && mount -t tmpfs none /run/netns
    $IP link set lo up
    $IP netns add far
    $IP link add eth0 type veth peer name eth0 netns far
    $IP address add 198.51.100.1/24 dev eth0
    $IP link set eth0 up
    $IP -n far address add 198.51.100.2/24 dev eth0
    $IP -n far link set eth0 up
    $IP netns exec far $ETHTOOL -K eth0 tx off >/dev/null
    $NFT "table inet t { chain c { type filter hook prerouting priority 0; tcp flags & (syn | ack) == syn log group 5; }; }"
    first() {
        timeout 10 $TCPDUMP -Z root -i nflog:5 -c 1 -nvv >copy 2>/dev/null &
        for _ in 1 2 3 4 5 6; do sleep 0.3; "$@" 2>/dev/null || true; kill -0 $! 2>/dev/null || break; done
        wait $! || true
        grep -o "cksum [^)]*)" copy | head -1
    }
    over_loopback="$(first bash -c "exec 3<>/dev/tcp/127.0.0.1/9")"
    over_wire="$(first $IP netns exec far timeout 1 bash -c "exec 3<>/dev/tcp/198.51.100.1/9")"
    echo "over loopback: $over_loopback"
    echo "over a wire:   $over_wire"
    [[ $over_loopback == *incorrect* && $over_wire == *correct* && $over_wire != *incorrect* ]]
'
echo "as described"
