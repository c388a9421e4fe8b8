#!/usr/bin/env bash
# Compares holdfast with etcd: three members of each on this machine, the same generator, the
# cases in turn on both, the medians of several rounds as a Markdown table.
#
#   ETCD_BIN=path/to/etcd HOLDFAST_BIN=target/release/holdfast benches/compare.sh
#
#   ETCD_BIN      the etcd to compare with                                   (required)
#   HOLDFAST_BIN  the holdfast binary; it is also the load generator         (required)
#   DURATION      seconds of each measurement                                (5)
#   WARMUP        seconds under load before each measurement                 (1)
#   ROUNDS        how often each case is measured on each of the two         (3)
#   BASE_PORT     the first of the twelve ports used on 127.0.0.1            (23790)
#   WORK_DIR      where data and logs go; removed at the end only if unset   (a temporary folder)
#   BENCH_BIN     another binary as load generator                           (HOLDFAST_BIN)
#   BENCH_FLAGS   further flags of `bench`, such as "--connections 64"       (none)
#
# Both clusters run all the time and the order changes from round to round, so that what else the
# machine does meets both alike. Members and generator share the machine: the table says which of
# the two needs less for the same work here, not what either reaches on machines of its own.

set -euo pipefail

etcd_bin=${ETCD_BIN:?set ETCD_BIN to the etcd binary}
holdfast_bin=${HOLDFAST_BIN:?set HOLDFAST_BIN to the holdfast binary}
bench_bin=${BENCH_BIN:-$holdfast_bin}
duration=${DURATION:-5}
warmup=${WARMUP:-1}
rounds=${ROUNDS:-3}
base_port=${BASE_PORT:-23790}
read -r -a bench_flags <<<"${BENCH_FLAGS:-}"

# One line for each row of the table: its title, then the arguments of `bench`.
cases=(
    "put, 64 clients|put --clients 64"
    "put, 1 client|put --clients 1"
    "range, 64 clients|range --clients 64"
    "range-serializable, 64 clients|range-serializable --clients 64"
    "lock, 64 names, 64 clients|lock --clients 64 --names 64"
)

for binary in "$etcd_bin" "$holdfast_bin" "$bench_bin"; do
    [[ -x $binary ]] || { echo "compare: $binary is not an executable file" >&2; exit 1; }
done

if [[ -n ${WORK_DIR:-} ]]; then
    work_dir=$WORK_DIR
    mkdir -p "$work_dir"
else
    work_dir=$(mktemp -d)
fi

started=()
clean_up() {
    local pid
    for pid in "${started[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in "${started[@]}"; do wait "$pid" 2>/dev/null || true; done
    if [[ -z ${WORK_DIR:-} ]]; then rm -rf -- "$work_dir"; fi
}
trap clean_up EXIT
trap 'exit 130' INT TERM

declare -A endpoints pids

# start NAME BINARY FIRST_PORT: three members; fills endpoints[NAME] and pids[NAME].
start() {
    local cluster=$1 binary=$2 port=$3 member peers=""
    for member in 0 1 2; do
        peers+="${peers:+,}$cluster$member=http://127.0.0.1:$((port + 2 * member + 1))"
    done
    for member in 0 1 2; do
        local client="http://127.0.0.1:$((port + 2 * member))"
        local peer="http://127.0.0.1:$((port + 2 * member + 1))"
        "$binary" --name "$cluster$member" --data-dir "$work_dir/$cluster$member" \
            --listen-client-urls "$client" --advertise-client-urls "$client" \
            --listen-peer-urls "$peer" --initial-advertise-peer-urls "$peer" \
            --initial-cluster "$peers" --initial-cluster-state new \
            --initial-cluster-token "compare-$cluster" \
            >"$work_dir/$cluster$member.log" 2>&1 &
        started+=($!)
        pids[$cluster]+="${pids[$cluster]:+,}$!"
        endpoints[$cluster]+="${endpoints[$cluster]:+,}$client"
    done
}

# Succeeds when every member of the cluster answers a write.
await() {
    local cluster=$1 attempt
    for attempt in {1..60}; do
        if "$bench_bin" bench put --endpoints "${endpoints[$cluster]}" --clients 3 --total 3 \
            --warmup 0 --timeout 2 --json 2>/dev/null | grep -q '"errors":0,'; then
            return 0
        fi
        sleep 0.5
    done
    echo "compare: $cluster does not answer; the end of a log:" >&2
    tail -n 20 "$work_dir/${cluster}0.log" >&2
    return 1
}

# measure CLUSTER CASE_NUMBER: one line of JSON, appended to the results of both.
measure() {
    local cluster=$1 number=$2 arguments
    read -r -a arguments <<<"${cases[$number]#*|}"
    "$bench_bin" bench "${arguments[@]}" ${bench_flags[@]+"${bench_flags[@]}"} \
        --value-size 256 --duration "$duration" --warmup "$warmup" --json \
        --endpoints "${endpoints[$cluster]}" --pids "${pids[$cluster]}" \
        >>"$work_dir/$cluster.$number.json"
}

# median CLUSTER CASE_NUMBER FIELD
median() {
    sed -n "s/.*\"$3\":\([0-9][0-9.eE+-]*\).*/\1/p" "$work_dir/$1.$2.json" | sort -g |
        awk '{ all[NR] = $1 }
             END { if (NR) printf "%.9g", NR % 2 ? all[(NR + 1) / 2] : (all[NR / 2] + all[NR / 2 + 1]) / 2 }'
}

# column CASE_NUMBER FIELD FORMAT: "etcd | holdfast | holdfast divided by etcd"
column() {
    awk -v etcd="$(median etcd "$1" "$2")" -v holdfast="$(median holdfast "$1" "$2")" \
        -v format="$3" 'BEGIN {
            ratio = etcd > 0 ? sprintf("%.2f", holdfast / etcd) : "-"
            printf format " | " format " | **%s**", etcd, holdfast, ratio
        }'
}

errors() {
    sed -n 's/.*"errors":\([0-9]*\),.*/\1/p' "$work_dir/$1.$2.json" | awk '{ sum += $1 } END { print sum + 0 }'
}

rm -f "$work_dir"/{etcd,holdfast}.*.json
start etcd "$etcd_bin" "$base_port"
start holdfast "$holdfast_bin" $((base_port + 6))
await etcd
await holdfast

for ((round = 0; round < rounds; round++)); do
    for number in "${!cases[@]}"; do
        echo "round $((round + 1)) of $rounds: ${cases[$number]%%|*}" >&2
        if ((round % 2 == 0)); then order=(etcd holdfast); else order=(holdfast etcd); fi
        for cluster in "${order[@]}"; do
            # A run without a single success must not cost the other cases: its row shows it.
            measure "$cluster" "$number" || echo "compare: $cluster failed" >&2
        done
    done
done

echo "Three members each, 256 B values, medians of $rounds rounds of $duration s. E: etcd, H: holdfast."
echo
echo "| case | op/s E | H | H/E | p50 ms E | H | H/E | p99 ms E | H | H/E | CPU s per 1,000 E | H | H/E | errors E | H |"
echo "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: |"
for number in "${!cases[@]}"; do
    echo "| ${cases[$number]%%|*}" \
        "| $(column "$number" ops_per_second %.0f)" \
        "| $(column "$number" p50_ms %.2f)" \
        "| $(column "$number" p99_ms %.2f)" \
        "| $(column "$number" cpu_seconds_per_1000 %.4f)" \
        "| $(errors etcd "$number") | $(errors holdfast "$number") |"
done
