#!/bin/sh
# Runs in the machine of ../shared/vm, as its ordinary user. Argument: what this machine is like.
# Prints a line `ok WHAT` or `not ok WHAT` for each check, and exits with 1 if one failed.
kind=$1
failed=0
check() { # WHAT COMMAND…: the command succeeds
    what=$1; shift
    if out=$("$@" 2>&1); then echo "ok $what"; else echo "not ok $what"; echo "$out" | sed 's/^/    /'; failed=1; fi
}
shows() { # WHAT STATUS TEXT COMMAND…: the exit status, and the text in the output
    what=$1 status=$2 text=$3; shift 3
    out=$("$@" 2>&1); got=$?
    case $out in *"$text"*) fits=1 ;; *) fits= ;; esac
    if [ $got = "$status" ] && [ "$fits" ]; then echo "ok $what"; else
        echo "not ok $what: exit $got rather than $status, or no '$text' in:"; echo "$out" | sed 's/^/    /'; failed=1
    fi
}
nothing_left() {
    left=$(ps -e -o comm= | grep -c '^rootlet'); mounts=$(grep -c rootlet /proc/self/mountinfo)
    [ "$left" = 0 ] && [ "$mounts" = 0 ] && [ -z "$(ls -A ~/.local/state/rootlet/boxes 2>/dev/null)" ]
}
r=./rootlet
case $kind in
    works | single)
        check doctor $r doctor
        shows root-inside 0 0 $r run --rm -- id -u
        shows exit-status 42 '' $r run --rm -- sh -c 'exit 42'
        shows copy-on-write 0 inside $r run --rm -- sh -c 'echo inside > ~/f; cat ~/f'
        check host-unchanged test ! -e ~/f
        shows own-network 0 tap0 $r run --rm -- ls /sys/class/net
        shows chown 0 fine $r run --rm -- sh -c 'touch f && chown 33:33 f && mknod d c 1 3 && echo fine'
        shows no-network 0 lo $r run --rm --network none -- ls /sys/class/net
        shows timeout 124 '' $r run --rm --timeout 20s -- sleep 100000
        shows nested 0 deep $r run --rm --nested -- env XDG_STATE_HOME=/tmp/s $PWD/rootlet run --rm -- echo deep
        shows changes-kept 0 'rootlet diff changed' $r run --name changed -- touch new
        shows diff 0 /new $r diff changed
        check rm $r rm changed
        if [ "$kind" = works ]; then shows range 0 65535 $r run --rm -- cat /proc/self/uid_map; fi
        ;;
    no-userns) # the limit is 0
        shows doctor 1 max_user_namespaces $r doctor
        shows run 125 max_user_namespaces $r run --rm -- true
        ;;
    apparmor)
        shows doctor 1 AppArmor $r doctor
        shows run 125 'AppArmor' $r run --rm -- true
        ;;
    no-fuse)
        shows doctor 1 'modprobe fuse' $r doctor
        shows run 125 'modprobe fuse' $r run --rm -- true
        ;;
    no-tun)
        shows run 125 'modprobe tun' $r run --rm -- true
        shows without-network 0 fine $r run --rm --network none -- echo fine
        ;;
    *) echo "unknown kind $kind"; exit 2 ;;
esac
check nothing-left nothing_left
exit $failed
