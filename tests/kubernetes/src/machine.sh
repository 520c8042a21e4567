#!/bin/sh
# Boots one machine of the cluster: a root of its own, made of the host's programs (read-only) and the
# machine's own disk, in namespaces of its own. The process becomes the machine's init. Everything of
# the machine ends with it, and it ends with its standard input.
#
# machine.sh join   <folder> <name> <programs> <cgroup folder>...
#     moves itself to the machine's cgroups, and on to the other two stages
set -eu
stage="$1" folder="$2" name="$3" programs="$4"

case "$stage" in
join)
    shift 4
    for cgroup; do echo 0 >"$cgroup/cgroup.procs"; done
    exec unshare --cgroup -- "$0" leave "$folder" "$name" "$programs" "$@"
    ;;
leave)
    # The machine's cgroups are the root now. No process may stay there (cgroup v2), so all of them
    # live in one below.
    shift 4
    for cgroup; do
        echo 0 >"$cgroup/system/cgroup.procs"
        [ -e "$cgroup/cgroup.controllers" ] || continue
        for controller in $(cat "$cgroup/cgroup.controllers"); do
            echo "+$controller" >"$cgroup/cgroup.subtree_control"
        done
    done
    exec unshare --mount --uts --ipc --pid --fork --kill-child -- \
        "$0" init "$folder" "$name" "$programs"
    ;;
esac

echo "$name" >/proc/sys/kernel/hostname
cgroups="$(awk '{ for (i = 7; i < NF; i++) if ($i == "-") print $5, $(i + 1), $NF }' /proc/self/mountinfo |
    awk '$1 ~ "^/sys/fs/cgroup" && ($2 == "cgroup" || $2 == "cgroup2")' | sort -u)"

root="$folder/root"
mkdir -p "$root"
mount -t tmpfs -o mode=755 "$name" "$root"
cd "$root"
mkdir proc sys dev run usr etc opt var root home srv mnt
mkdir -m 1777 tmp
for directory in bin sbin lib lib32 lib64 libx32; do
    if [ -L "/$directory" ]; then
        cp -P "/$directory" "$directory"
    elif [ -d "/$directory" ]; then
        mkdir "$directory"
        mount --bind "/$directory" "$directory"
        mount -o remount,bind,ro "$directory"
    fi
done
mount --bind /usr usr
mount -o remount,bind,ro usr
for directory in etc opt var; do mount --bind "$folder/disk/$directory" "$directory"; done
mount --bind "$programs" opt/kubernetes/bin
mount -o remount,bind,ro opt/kubernetes/bin
mount -t tmpfs -o mode=755 run run
mkdir -p run/lock run/netns
mount -t proc proc proc
mount -t sysfs sysfs sys
mount --rbind /dev dev
mount -t tmpfs -o mode=1777 shm dev/shm

# As after a real start, the machine tells another boot than before.
cat /proc/sys/kernel/random/uuid >run/boot-id
mount --bind run/boot-id proc/sys/kernel/random/boot_id

# Fresh mounts of the cgroups show the machine's as the root.
if echo "$cgroups" | grep -q '^/sys/fs/cgroup cgroup2 '; then
    mount -t cgroup2 cgroup2 sys/fs/cgroup
else
    mount -t tmpfs -o mode=755 cgroup sys/fs/cgroup
    echo "$cgroups" | while read -r place kind options; do
        mkdir "$root$place"
        if [ "$kind" = cgroup2 ]; then
            mount -t cgroup2 cgroup2 "$root$place"
            continue
        fi
        case "$options" in *name=systemd*) options=none,name=systemd ;; esac
        options="$(echo "$options" | sed 's/^rw,//')"
        mount -t cgroup -o "$options" cgroup "$root$place"
    done
fi

mkdir old
pivot_root . old
cd /
umount -l /old
rmdir /old
# Pods may ask for mounts that reach the machine, and the other way round.
mount --make-rshared /
echo ready
# A shell that waits for a program also takes leave of processes that lost their parent.
cat >/dev/null
exit 0
