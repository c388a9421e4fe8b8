#!/usr/bin/env bash
# What a store of many keys costs: memory and disk of a member, and the time from a restart to the
# first linearizable read, for a follower and for all three. Three members on this machine, etcd
# first, then Holdfast; a table in Markdown.
#
#   ETCD_BIN=path/to/etcd HOLDFAST_BIN=target/release/holdfast benches/restart.sh
#
#   KEYS       how many, of 256 bytes each                           (1000000)
#   SETTLE     seconds without load before memory and disk are read  (40)
#   BASE_PORT  the first of the six ports                            (24790)
set -euo pipefail

etcd_bin=${ETCD_BIN:?set ETCD_BIN to the etcd binary}
holdfast_bin=${HOLDFAST_BIN:?set HOLDFAST_BIN to the holdfast binary}
keys=${KEYS:-1000000}
settle=${SETTLE:-40}
base_port=${BASE_PORT:-24790}
work_dir=$(mktemp -d)
pids=()

stop_all() {
    local pid
    for pid in "${pids[@]}"; do kill -9 "$pid" 2>/dev/null || true; done
    for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
    pids=()
}
trap 'stop_all; rm -rf -- "$work_dir"' EXIT
trap 'exit 130' INT TERM

client() { echo "http://127.0.0.1:$((base_port + 2 * $1))"; }

# start NAME BINARY MEMBER
start() {
    local peers="" member
    for member in 0 1 2; do
        peers+="${peers:+,}$1$member=http://127.0.0.1:$((base_port + 2 * member + 1))"
    done
    local peer="http://127.0.0.1:$((base_port + 2 * $3 + 1))"
    "$2" --name "$1$3" --data-dir "$work_dir/$1$3" --initial-cluster "$peers" \
        --initial-cluster-token "restart-$1" --initial-cluster-state new \
        --listen-client-urls "$(client "$3")" --advertise-client-urls "$(client "$3")" \
        --listen-peer-urls "$peer" --initial-advertise-peer-urls "$peer" \
        --quota-backend-bytes $((8 << 30)) >>"$work_dir/$1$3.log" 2>&1 &
    pids[$3]=$!
}

# Seconds until each of these members answers a linearizable read.
until_read() {
    local began=$EPOCHREALTIME member
    for member in "$@"; do
        until "$holdfast_bin" health --endpoints "$(client "$member")" --timeout 1s >/dev/null 2>&1; do
            sleep 0.02
        done
    done
    awk -v from="$began" -v to="$EPOCHREALTIME" 'BEGIN { printf "%.2f", to - from }'
}

resident_mib() { awk '/VmRSS/ { printf "%.0f", $2 / 1024 }' "/proc/$1/status"; }

# The number of a member that does not lead.
follower() {
    local member
    for member in 0 1 2; do
        if "$holdfast_bin" bench range-serializable --followers --clients 1 --total 1 --warmup 0 \
            --key-space 1 --prefix probe --endpoints "$(client "$member")" >/dev/null 2>&1; then
            echo "$member"
            return
        fi
    done
    return 1
}

measure() {
    local name=$1 binary=$2 member
    for member in 0 1 2; do start "$name" "$binary" "$member"; done
    until_read 0 1 2 >/dev/null
    "$holdfast_bin" bench put --clients 64 --key-space "$keys" --total 64 --warmup 0 --timeout 60 \
        --endpoints "$(client 0),$(client 1),$(client 2)" >&2
    sleep "$settle"
    local memory disk after one all
    member=$(follower)
    memory=$(resident_mib "${pids[$member]}")
    disk=$(du -sm "$work_dir/$name$member" | cut -f1)
    kill -9 "${pids[$member]}"
    wait "${pids[$member]}" 2>/dev/null || true
    start "$name" "$binary" "$member"
    one=$(until_read "$member")
    sleep "$settle"
    after=$(resident_mib "${pids[$member]}")
    stop_all
    for member in 0 1 2; do start "$name" "$binary" "$member"; done
    all=$(until_read 0 1 2)
    stop_all
    echo "| $name | $memory | $after | $disk | $one | $all |"
}

echo "| $keys keys of 256 B | memory MiB | after a restart | disk MiB | follower reads after s | all three after s |"
echo "| --- | --: | --: | --: | --: | --: |"
measure etcd "$etcd_bin"
measure holdfast "$holdfast_bin"
