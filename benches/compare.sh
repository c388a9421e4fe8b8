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
#   WORK_DIR      where logs and results stay; data is always removed        (a temporary folder)
#   BENCH_BIN     another binary as load generator                           (HOLDFAST_BIN)
#   BENCH_FLAGS   further flags of `bench`, such as "--connections 64"       (none)
#   GROUPS_WANTED which groups of cases, separated by spaces; see below      (kv)
#
# A group begins with two fresh clusters, that of etcd and that of Holdfast. Both run until its end,
# and the order changes from round to round, so that what else the machine does meets both alike.
# Members and generator share the machine: the table says which of the two needs less for the same
# work here, not what either reaches on machines of its own.

set -euo pipefail

etcd_bin=${ETCD_BIN:?set ETCD_BIN to the etcd binary}
holdfast_bin=${HOLDFAST_BIN:?set HOLDFAST_BIN to the holdfast binary}
bench_bin=${BENCH_BIN:-$holdfast_bin}
duration=${DURATION:-5}
warmup=${WARMUP:-1}
rounds=${ROUNDS:-3}
base_port=${BASE_PORT:-23790}
read -r -a bench_flags <<<"${BENCH_FLAGS:-}"

# One line for each row of the table: its group, its title, then the arguments of `bench`.
all_cases=(
    "kv|put, 64 clients|put --clients 64"
    "kv|put, 1 client|put --clients 1"
    "kv|range, 64 clients|range --clients 64"
    "kv|range-serializable, 64 clients|range-serializable --clients 64"
    "kv|lock, 64 names, 64 clients|lock --clients 64 --names 64"
    "watch|watch, 1,000 watchers on one key|watch --clients 1000"
    "watch|watch on a prefix, 64 writers|watch-prefix --clients 64"
    "catch-up|catch-up of 100,000 events|catch-up --clients 1 --key-space 100000"
    "reads|page of 1,000 of 100,000 keys, 16 clients|page --clients 16 --key-space 100000"
    "reads|count over 100,000 keys, 16 clients|count --clients 16 --key-space 100000"
    "leases|keep-alive of 1,000 leases through followers|keep-alive --clients 1000 --followers"
    "leases|lease grant, 64 clients|lease-grant --clients 64"
    "leases|lease grant, 10 keys, revoke, 64 clients|lease-cycle --clients 64"
    "ends|1,000 leases that end together|lease-end --clients 1000"
    "ends|the same beside 10,000 others|lease-end --clients 1000 --others 10000"
    "locks|lock, 1 client|lock --clients 1"
    "locks|lock, 64 names, 64 clients|lock --clients 64 --names 64"
    "locks|campaign, 1 client|campaign --clients 1"
    "locks|campaign, 64 names, 64 clients|campaign --clients 64 --names 64"
    "locks|proclaim, 64 clients|proclaim --clients 64"
    "locks|observe, 100 observers|observe --clients 100"
    "queues|lock, one name, 2 clients|lock --clients 2 --names 1"
    "queues|lock, one name, 10 clients|lock --clients 10 --names 1"
    "queues|lock, one name, 100 clients|lock --clients 100 --names 1 --timeout 120"
    "queues|lock, one name, 1,000 clients|lock --clients 1000 --names 1 --timeout 120"
    "queues|campaign, one name, 2 clients|campaign --clients 2 --names 1"
    "queues|campaign, one name, 10 clients|campaign --clients 10 --names 1"
    "queues|campaign, one name, 100 clients|campaign --clients 100 --names 1 --timeout 120"
    "queues-10k|lock, one name, 10,000 clients|lock --clients 10000 --names 1 --timeout 600"
    "txn|transaction of 10 puts, 64 clients|txn10 --clients 64"
    "size-10k|put, 64 clients, 10,000 keys|put --clients 64 --key-space 10000"
    "size-100k|put, 64 clients, 100,000 keys|put --clients 64 --key-space 100000"
    "size-1m|put, 64 clients, 1,000,000 keys|put --clients 64 --key-space 1000000"
)
read -r -a groups <<<"${GROUPS_WANTED:-kv}"

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
stop_all() {
    local pid
    for pid in "${started[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in "${started[@]}"; do wait "$pid" 2>/dev/null || true; done
    started=()
}
clean_up() {
    stop_all
    if [[ -z ${WORK_DIR:-} ]]; then rm -rf -- "$work_dir"; fi
}
trap clean_up EXIT
trap 'exit 130' INT TERM

declare -A endpoints pids
group=""

# start NAME BINARY FIRST_PORT: three members; fills endpoints[NAME] and pids[NAME].
start() {
    local cluster=$1 binary=$2 port=$3 member peers=""
    endpoints[$cluster]="" pids[$cluster]=""
    for member in 0 1 2; do
        peers+="${peers:+,}$cluster$member=http://127.0.0.1:$((port + 2 * member + 1))"
    done
    for member in 0 1 2; do
        local client="http://127.0.0.1:$((port + 2 * member))"
        local peer="http://127.0.0.1:$((port + 2 * member + 1))"
        "$binary" --name "$cluster$member" --data-dir "$work_dir/$group/$cluster$member" \
            --listen-client-urls "$client" --advertise-client-urls "$client" \
            --listen-peer-urls "$peer" --initial-advertise-peer-urls "$peer" \
            --initial-cluster "$peers" --initial-cluster-state new \
            --initial-cluster-token "compare-$cluster" \
            >"$work_dir/$group/$cluster$member.log" 2>&1 &
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
            --key-space 3 --warmup 0 --timeout 2 --json 2>/dev/null | grep -q '"errors":0,'; then
            return 0
        fi
        sleep 0.5
    done
    echo "compare: $cluster does not answer; the end of a log:" >&2
    tail -n 20 "$work_dir/$group/${cluster}0.log" >&2
    return 1
}

# measure CLUSTER CASE_NUMBER: one line of JSON, appended to the results of both.
measure() {
    local cluster=$1 number=$2 arguments
    read -r -a arguments <<<"${all_cases[$number]##*|}"
    "$bench_bin" bench "${arguments[@]}" ${bench_flags[@]+"${bench_flags[@]}"} \
        --value-size 256 --duration "$duration" --warmup "$warmup" --json \
        --endpoints "${endpoints[$cluster]}" --pids "${pids[$cluster]}" \
        >>"$work_dir/$cluster.$number.json"
}

title() {
    local rest=${all_cases[$1]#*|}
    echo "${rest%%|*}"
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

# plain CLUSTER CASE_NUMBER FIELD FORMAT
plain() {
    local value
    value=$(median "$1" "$2" "$3")
    # shellcheck disable=SC2059
    printf "$4" "${value:-0}"
}

errors() {
    sed -n 's/.*"errors":\([0-9]*\),.*/\1/p' "$work_dir/$1.$2.json" | awk '{ sum += $1 } END { print sum + 0 }'
}

for group in "${groups[@]}"; do
    numbers=()
    for number in "${!all_cases[@]}"; do
        if [[ ${all_cases[$number]%%|*} == "$group" ]]; then numbers+=("$number"); fi
    done
    ((${#numbers[@]})) || { echo "compare: there is no group $group" >&2; exit 1; }
    rm -rf -- "${work_dir:?}/$group"
    mkdir -p "$work_dir/$group"
    for number in "${numbers[@]}"; do rm -f "$work_dir"/{etcd,holdfast}."$number".json; done
    start etcd "$etcd_bin" "$base_port"
    start holdfast "$holdfast_bin" $((base_port + 6))
    await etcd
    await holdfast
    for ((round = 0; round < rounds; round++)); do
        for number in "${numbers[@]}"; do
            echo "round $((round + 1)) of $rounds: $(title "$number")" >&2
            if ((round % 2 == 0)); then order=(etcd holdfast); else order=(holdfast etcd); fi
            for cluster in "${order[@]}"; do
                # A run without a single success must not cost the other cases: its row shows it.
                measure "$cluster" "$number" || echo "compare: $cluster failed" >&2
            done
        done
    done
    stop_all
    rm -rf -- "${work_dir:?}/$group"/{etcd,holdfast}[0-2]
done

echo "Three members each, 256 B values, medians of $rounds rounds of $duration s. E: etcd, H: holdfast."
echo
echo "| case | op/s E | H | H/E | p50 ms E | H | H/E | p99 ms E | H | H/E | CPU s per 1,000 E | H | H/E | generator's E | H | errors E | H |"
echo "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: |"
for number in "${!all_cases[@]}"; do
    [[ " ${groups[*]} " == *" ${all_cases[$number]%%|*} "* ]] || continue
    echo "| $(title "$number")" \
        "| $(column "$number" ops_per_second %.0f)" \
        "| $(column "$number" p50_ms %.2f)" \
        "| $(column "$number" p99_ms %.2f)" \
        "| $(column "$number" cpu_seconds_per_1000 %.4f)" \
        "| $(plain etcd "$number" client_cpu_seconds_per_1000 %.4f)" \
        "| $(plain holdfast "$number" client_cpu_seconds_per_1000 %.4f)" \
        "| $(errors etcd "$number") | $(errors holdfast "$number") |"
done
echo
for number in "${!all_cases[@]}"; do
    [[ " ${groups[*]} " == *" ${all_cases[$number]%%|*} "* ]] || continue
    [[ ${all_cases[$number]##*|} == *"--names 1"* ]] || continue
    echo "- $(title "$number"): hand-over p50 E $(plain etcd "$number" hand_over_p50_ms %.2f) ms," \
        "H $(plain holdfast "$number" hand_over_p50_ms %.2f) ms;" \
        "p99 E $(plain etcd "$number" hand_over_p99_ms %.2f) ms," \
        "H $(plain holdfast "$number" hand_over_p99_ms %.2f) ms."
done
for number in "${!all_cases[@]}"; do
    [[ " ${groups[*]} " == *" ${all_cases[$number]%%|*} "* ]] || continue
    [[ ${all_cases[$number]##*|} == watch-prefix* ]] || continue
    echo "$(title "$number"): p99 from a write's answer to its event" \
        "E $(plain etcd "$number" lag_after_answer_p99_ms %.2f) ms," \
        "H $(plain holdfast "$number" lag_after_answer_p99_ms %.2f) ms."
done
