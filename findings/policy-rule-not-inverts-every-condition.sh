#!/usr/bin/env bash
# Linux policy routing: `ip rule add not fwmark X ipproto tcp …` is not "TCP without the mark X".
#
# Seen with iproute2 6.1.0-3 of Debian 12 on Linux 6.18: `not` inverts the whole of a rule's conditions, so this rule also
# matches UDP, ICMP and the routing look-ups of ARP, with the mark or without it. Documentation (ip-rule(8)) says only that `not` inverts
# a selector. "TCP without the mark" takes two rules: one with the mark and `goto`, and one with `ipproto tcp`.
set -euo pipefail
[[ $EUID -eq 0 ]] || { echo "run as root: it makes a network namespace" >&2; exit 2; }
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get download -qq iproute2=6.1.0-3
dpkg -x iproute2_*.deb .
export IP="$work/bin/ip"
unshare --net bash -euc '
    $IP link set lo up
    $IP link add eth0 type veth peer name far
    $IP link set far up
    $IP address add 198.51.100.2/24 dev eth0
    $IP link set eth0 up
    $IP route add local default dev lo table 7
    look() { $IP route get 198.51.100.9 "$@" | head -1 | awk "{print \$1}"; }
    $IP rule add not fwmark 1 ipproto tcp lookup 7 priority 10
    echo "not fwmark 1 ipproto tcp: TCP $(look ipproto tcp), TCP with the mark $(look ipproto tcp mark 1), UDP $(look ipproto udp), UDP with the mark $(look ipproto udp mark 1)"
    [[ $(look ipproto tcp) == local && $(look ipproto tcp mark 1) != local ]]
    # What surprises:
    [[ $(look ipproto udp) == local && $(look ipproto udp mark 1) == local ]]
    $IP rule del priority 10
    $IP rule add fwmark 1 goto 12 priority 10
    $IP rule add ipproto tcp lookup 7 priority 11
    $IP rule add nop priority 12
    echo "with goto: TCP $(look ipproto tcp), TCP with the mark $(look ipproto tcp mark 1), UDP $(look ipproto udp)"
    [[ $(look ipproto tcp) == local && $(look ipproto tcp mark 1) != local && $(look ipproto udp) != local ]]
'
echo "as described"
