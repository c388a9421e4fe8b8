#!/usr/bin/env bash
# What upkeep costs those who write meanwhile: puts per second and their latency, quiet, then while a new
# learner is brought up to date, then while 900,000 revisions are compacted and the store defragmented.
# Three members on this machine, etcd first, then Holdfast; a table in Markdown.
#
#   ETCD_BIN=path/to/etcd ETCDCTL_BIN=path/to/etcdctl HOLDFAST_BIN=target/release/holdfast \
#       benches/upkeep.sh
#
#   KEYS       how many, of 256 bytes each; the learner gets them all  (100000)
#   REVISIONS  how many are compacted                                  (900000)
#   SECONDS_EACH  how long each load runs                              (20)
#   STORES     which are measured                                      (etcd holdfast)
#   CLIENTS    of the load                                             (16)
#   BASE_PORT  the first of the eight ports                            (24890)
set -euo pipefail

etcd_bin=${ETCD_BIN:?set ETCD_BIN to the etcd binary}
etcdctl_bin=${ETCDCTL_BIN:?set ETCDCTL_BIN to the etcdctl binary}
holdfast_bin=${HOLDFAST_BIN:?set HOLDFAST_BIN to the holdfast binary}
keys=${KEYS:-100000}
revisions=${REVISIONS:-900000}
seconds=${SECONDS_EACH:-20}
clients=${CLIENTS:-16}
base_port=${BASE_PORT:-24890}
stores=${STORES:-etcd holdfast}
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
peer() { echo "http://127.0.0.1:$((base_port + 2 * $1 + 1))"; }
endpoints() { echo "$(client 0),$(client 1),$(client 2)"; }

# start NAME BINARY MEMBER STATE MEMBERS
start() {
    local peers="" member
    for ((member = 0; member < $5; member++)); do
        peers+="${peers:+,}$1$member=$(peer "$member")"
    done
    "$2" --name "$1$3" --data-dir "$work_dir/$1$3" --initial-cluster "$peers" \
        --initial-cluster-token "upkeep-$1" --initial-cluster-state "$4" \
        --listen-client-urls "$(client "$3")" --advertise-client-urls "$(client "$3")" \
        --listen-peer-urls "$(peer "$3")" --initial-advertise-peer-urls "$(peer "$3")" \
        --quota-backend-bytes $((8 << 30)) >>"$work_dir/$1$3.log" 2>&1 &
    pids[$3]=$!
}

ctl() { "$etcdctl_bin" --endpoints "$(endpoints)" --command-timeout 600s "$@"; }

until_ready() {
    until "$holdfast_bin" health --endpoints "$(client "$1")" --timeout 1s >/dev/null 2>&1; do
        sleep 0.1
    done
}

# load SECONDS: puts over all keys; prints op/s, p50 and p99 in ms.
load() {
    "$holdfast_bin" bench put --json --clients "$clients" --key-space "$keys" --duration "$1" \
        --warmup 1 --timeout 60 --endpoints "$(endpoints)" >"$work_dir/load.json"
    field() { grep -o "\"$1\":[0-9.]*" "$work_dir/load.json" | head -n 1 | cut -d: -f2; }
    echo "$(field ops_per_second) $(field p50_ms) $(field p99_ms)"
}

# Runs the load and `$@` beside it, and waits for both. Prints a row.
beside() {
    local name=$1 case=$2 began=$EPOCHREALTIME
    shift 2
    load "$seconds" >"$work_dir/row" &
    local loading=$!
    sleep 3
    began=$EPOCHREALTIME
    "$@" >&2
    local took
    took=$(awk -v from="$began" -v to="$EPOCHREALTIME" 'BEGIN { printf "%.2f", to - from }')
    wait "$loading"
    read -r rate p50 p99 <"$work_dir/row"
    echo "| $name | $case | $rate | $p50 | $p99 | $took |"
}

# A member is caught up when it counts all keys itself.
learn() {
    ctl member add "${1}3" --learner --peer-urls "$(peer 3)" >/dev/null
    start "$1" "$2" 3 existing 4
    local count=0
    until [ "$count" -ge "$keys" ]; do
        sleep 0.1
        count=$("$etcdctl_bin" --endpoints "$(client 3)" --consistency s get bench --prefix \
            --count-only --write-out fields 2>/dev/null | awk '/"Count"/ { print $3 }') || true
        count=${count:-0}
    done
}

compact_and_defragment() {
    local revision
    revision=$(ctl get bench --write-out fields | awk '/"Revision"/ { print $3; exit }')
    ctl compaction "$((revision - 1))"
    ctl defrag
}

nothing() { :; }

measure() {
    local name=$1 binary=$2 member
    for member in 0 1 2; do start "$name" "$binary" "$member" new 3; done
    for member in 0 1 2; do until_ready "$member"; done
    "$holdfast_bin" bench put --clients 64 --key-space "$keys" --total "$revisions" --warmup 0 \
        --timeout 60 --endpoints "$(endpoints)" >&2
    beside "$name" quiet nothing
    beside "$name" "a learner catches up" learn "$name" "$binary"
    beside "$name" "compaction, then Defragment" compact_and_defragment
    stop_all
}

echo "| $keys keys, $revisions revisions | beside | op/s | p50 ms | p99 ms | it took s |"
echo "| --- | --- | --: | --: | --: | --: |"
for store in $stores; do
    case $store in
    etcd) measure etcd "$etcd_bin" ;;
    holdfast) measure holdfast "$holdfast_bin" ;;
    *)
        echo "no such store: $store" >&2
        exit 2
        ;;
    esac
done
