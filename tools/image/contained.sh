#!/usr/bin/env bash
# Runs a command in an image's root file system as a container engine would with --read-only, --cap-drop ALL,
# no-new-privileges and no network; the command is process 1. Linux, as root; ends with the command's exit code.
#
#   tools/image/contained.sh ROOT UID:GID ENVIRONMENT [SOURCE:TARGET ...] -- COMMAND...
#
# ROOT: a mounted image; ENVIRONMENT: a file of NAME=VALUE lines; SOURCE:TARGET: a folder or file, and where it is mounted,
# writable, or with :ro not.
set -euo pipefail

root="$1" user="$2" environment="$3"
shift 3
mounts=()
while [ "$1" != -- ]; do mounts+=("$1"); shift; done
shift

if [ -z "${CONTAINED:-}" ]; then
    # Namespaces first; the rest of this script then runs in them, as process 1.
    CONTAINED=1 exec unshare --mount --pid --net --ipc --uts --fork --kill-child \
        bash "${BASH_SOURCE[0]}" "${root}" "${user}" "${environment}" "${mounts[@]}" -- "$@"
fi

mount --make-rprivate /
mount --bind "${root}" "${root}"
mount -t proc proc "${root}/proc"
mount -t tmpfs -o mode=755 tmpfs "${root}/dev"
mkdir -m 1777 "${root}/dev/shm"
for device in null zero full random urandom; do
    touch "${root}/dev/${device}"
    mount --bind "/dev/${device}" "${root}/dev/${device}"
done
ln -s /proc/self/fd "${root}/dev/fd"
for entry in "${mounts[@]}"; do
    IFS=: read -r source target mode <<< "${entry}"
    # Mount points that the image lacks: the root is still writable, and a file or an empty folder does no harm.
    if [ -d "${source}" ]; then mkdir -p "${root}${target}"; else touch "${root}${target}"; fi
    mount --bind "${source}" "${root}${target}"
    if [ "${mode:-}" = ro ]; then mount -o remount,bind,ro "${root}${target}"; fi
done
mount -o remount,bind,ro "${root}"
ip link set lo up

mapfile -t variables < "${environment}"
exec chroot "${root}" /usr/bin/env --ignore-environment --chdir=/ "${variables[@]}" \
    /usr/bin/setpriv --reuid "${user%:*}" --regid "${user#*:}" --clear-groups \
    --bounding-set=-all --inh-caps=-all --no-new-privs "$@"
