#!/usr/bin/env bash
# One visit to a GPU machine without a network, in steps that each end within ten minutes and go on where they stopped.
#
#   visit.sh unpack NAME FOLDER   FOLDER/NAME.part*, by FOLDER/unpack.sh (stackrace engine bundle) -> $WORK/engines/NAME
#   visit.sh model                the seeded checkpoint, computed on the GPU into $MODELS, what is right to answer to the
#                                 questions of `verify`, and the load generator's own error; in the background
#   visit.sh trial BACKEND        one small point, in the background: that it starts, and its compilation is kept
#   visit.sh mend                 a copy of vLLM beside it whose V2 model runner loses no context: what `mended` runs
#   visit.sh race SECONDS NAME[,NAME] [...]   starts or goes on with sweeps (first, sglang, tune, mla_off, attention, context,
#                                 rates, mended, anchor: the point that every visit has), one after the other, in the
#                                 background; waits that long and says where it is
#   visit.sh all                  everything that a visit of half an hour has room for, in the background; `wait all SECONDS`
#                                 says where it is
#   visit.sh wait NAME SECONDS    the end of a background step (model, calibrate, trial-BACKEND, race-0), and what it printed last
#   visit.sh state                GPU, clocks, power, processes: what stands beside every figure
#   visit.sh pack PREFIX          results so far as PREFIX.00 ..., parts of a gzipped tar; without the prompts, which
#                                 follow from the seed and whose hash stays
#   visit.sh curate PREFIX [SWEEP ...]   where there is a network again: PREFIX.* -> ../SWEEP/runs for each sweep, whole points
#                                 only, without logs and with ~ for the home folder, and ../SWEEP/report.html; what is
#                                 published already is replaced where it is named
#
# With several GPUs, GPU=1 visit.sh race ... has GPU 1 and its share of the cores, and results to itself. What one has
# compiled, the others find, as soon as its engine has stopped.
# Each sweep is named after the card that it ran on: h100-dsv2-lite, h200-mla-off and so on.
# The machine has Python 3.12, torch 2.11 for CUDA 13 and triton 3.6; all else comes in bundles.
set -euo pipefail
export WORK=${WORK:-$HOME/visit} MODELS=${MODELS:-/dev/shm/models} GPU=${GPU:-0}
cards=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null || true)
count=$(wc -l <<<"$cards") # of GPUs
export CARD=${CARD:-$(head -1 <<<"$cards" | grep -oE 'H[12]00' | tr H h || true)}
export VISIT=$WORK/src/results/published/dsv2-lite # a copy: what the checkout holds may change while a race runs
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)

unpacker() { STACKRACE_ENGINES=$WORK/engines bash "$WORK/unpack.sh" "$@"; } # the bundle's own
site() { [ ! -e "$WORK/unpack.sh" ] || unpacker --path "$1"; }
export VLLM_SITE=$(site vllm) SGLANG_SITE=$(site sglang) VLLM_MENDED_SITE=$WORK/engines/vllm-mended
export FLASHINFER_WORKSPACE_BASE=$WORK/jit TVM_FFI_CACHE_DIR=$WORK/jit/tvm-ffi # both lock what they build
export PYTHONPATH=$WORK/src/src:$WORK/engines/stackrace HYDRA_FULL_ERROR=1
declare -A SWEEPS=(
  [first]="sweep=$CARD-dsv2-lite backend=vllm_hopper,vllm_v2_hopper,sglang_hopper"
  [sglang]="sweep=$CARD-sglang backend=sglang_hopper,sglang_eager_hopper,sglang_mixed_hopper"
  [tune]="sweep=$CARD-tune backend=vllm_workers_hopper,vllm_hopper concurrency=64,256"
  [mla_off]="sweep=$CARD-mla-off backend=vllm_hopper,vllm_mha_hopper concurrency=1,4,16,64 common.kv_cache_memory_bytes=34359738368"
  [attention]="sweep=$CARD-attention backend=vllm_flashmla_hopper,sglang_flashmla_hopper,vllm_triton_hopper,sglang_triton_hopper,vllm_hopper,sglang_hopper concurrency=1,16,64"
  [context]="sweep=$CARD-context backend=vllm_hopper,sglang_hopper concurrency=1,16 lengths.input.tokens=1024,8192,32000 stop.rounds=2"
  [rates]="sweep=$CARD-rates backend=vllm_hopper,sglang_hopper arrival=poisson concurrency=null stop.requests=null stop.seconds=60 arrival.rate=4,8,16,24,32,40,48"
  [mended]="sweep=$CARD-mended backend=vllm_mended_hopper concurrency=16,64,256"
  [anchor]="sweep=$CARD-anchor backend=vllm_hopper concurrency=16"
)

bench() { # of the sweeps' own settings, then what is asked
  mkdir -p "$WORK/results/gpu$GPU" "$WORK/references"
  ln -sfn "$WORK/references" "$WORK/results/gpu$GPU/references"
  alone python3 -m stackrace bench --config-dir "$VISIT/conf" experiment=dsv2_lite hardware="$CARD" models="$MODELS" \
    results="$WORK/results/gpu$GPU" calibration="$WORK/calibration.json" "$@"
}
alone() { # a command: with $GPU, its share of the cores, and a home of its own, where there are several GPUs
  if [ "$count" = 1 ]; then "$@"; return; fi
  mkdir -p "$WORK/home-$GPU"
  env "CUDA_VISIBLE_DEVICES=$GPU" "HOME=$WORK/home-$GPU" taskset -c "$(cores)" "$@"
}
cores() { # those of $GPU
  python3 -c 'import os, sys; g, n = map(int, sys.argv[1:]); c = sorted(os.sched_getaffinity(0)); k = len(c) // n
print(",".join(map(str, c[g * k : (g + 1) * k])))' "$GPU" "$count"
}
on_a_card() { [ -n "$CARD" ] || { echo "no H100 or H200 here: set CARD to another name of conf/hardware" >&2; exit 2; }; }
copy() {
  [ -d "$WORK/src" ] || { mkdir -p "$WORK/src" && tar -C "$ROOT" -c src results/published/dsv2-lite pyproject.toml | tar -xC "$WORK/src"; }
}
in_background() { # NAME command...: keeps running when this step ends; its output in $WORK/NAME.log
  local name=$1; shift
  if is_running "$name"; then echo "$name runs already"; return; fi
  (cd "$WORK" && exec setsid --fork bash -c 'echo $$ >"$1.pid"; shift; exec "$@"' - "$WORK/$name" "$@" \
    >>"$WORK/$name.log" 2>&1 </dev/null)
  sleep 1
}
is_running() { local pid; pid=$(cat "$WORK/$1.pid" 2>/dev/null) && kill -0 "$pid" 2>/dev/null; }
wait_for() { # NAME SECONDS: until it has ended, or for so long
  local end=$((SECONDS + $2))
  while is_running "$1" && [ $SECONDS -lt $end ]; do sleep 1; done
  tail -n "${LINES_SHOWN:-40}" "$WORK/$1.log" | cut -c1-300
  if is_running "$1"; then echo "$1: still running"; else echo "$1: ended"; fi
}

go() { # GPU, seconds, then sweeps, each with its settings in one word: one after the other, each ended after so long
  local GPU=$1 seconds=$2 sweep
  for sweep in "${@:3}"; do
    compiled home-all "home-$GPU"
    bash "$VISIT/visit.sh" race "$seconds" $sweep || echo "GPU $GPU: $sweep: exit code $?"
    stop "race-$GPU"
    compiled "home-$GPU" home-all
  done
}
compiled() { # FROM TO: what one home folder has and the other has not; no engine writes to either
  mkdir -p "$WORK/$1" "$WORK/$2"
  flock "$WORK/home-all.lock" cp -rn "$WORK/$1/." "$WORK/$2/" 2>/dev/null || true # 1: some were there
}
stop() { # NAME: end a background step as Ctrl-C would, with what it started, and by force where that takes a minute
  local signal
  for signal in TERM KILL; do
    is_running "$1" || return 0
    echo "$1 takes too long: SIG$signal"
    kill "-$signal" -- "-$(cat "$WORK/$1.pid")" || true
    wait_for "$1" 60 >/dev/null
  done
}
in_turn() { # GPU: a repeat of every setting, GPU k's beginning with the k-th, GPU 3's with the first again
  local stacks=(vllm sglang vllm_v2) order=() k
  for k in 0 1 2; do order+=("first backend=${stacks[($1 + k) % 3]}_hopper repeat=$1"); done
  go "$1" 500 "${order[@]}"
}
mend() { # merges every prompt of a batch with its context, not only the first of them
  [ ! -d "$VLLM_MENDED_SITE" ] || return 0
  rm -rf "$VLLM_MENDED_SITE.partial"; cp -al "$VLLM_SITE" "$VLLM_MENDED_SITE.partial"
  python3 - "$VLLM_MENDED_SITE.partial/vllm/model_executor/layers/attention/mla_attention.py" <<'PYTHON'
import sys
from pathlib import Path
path = Path(sys.argv[1])
text, wrong = path.read_text(), "prefill_query_start_loc_cpu[\n        num_prefills_with_context\n    ].item()"
assert text.count(wrong) == 1, f"{path} is not as in vLLM 0.26.0"
path.unlink()  # a hard link
path.write_text(text.replace(wrong, "prefill_query_start_loc_cpu[-1].item()"))
PYTHON
  mv "$VLLM_MENDED_SITE.partial" "$VLLM_MENDED_SITE"
}
wait_for_model() {
  while is_running model || is_running calibrate; do sleep 1; done
  [ -d "$MODELS/dsv2_lite-seed0" ] || { tail -3 "$WORK/model.log" >&2; exit 1; }
}

case ${1:-} in
unpack)
  mkdir -p "$WORK" && cp "$3/unpack.sh" "$WORK/" && unpacker "$2" "$3" ;;
model)
  copy; mkdir -p "$MODELS"; in_background model bash "$VISIT/visit.sh" run_model
  in_background calibrate bash "$VISIT/visit.sh" run_calibrate ;;
run_model)
  [ -d "$MODELS/dsv2_lite-seed0" ] ||
    python3 -m stackrace model make dsv2_lite --seed 0 --out "$MODELS/dsv2_lite-seed0" --device "${DEVICE:-cuda}"
  python3 "$VISIT/judge.py" "$WORK" models="$MODELS" hardware="$CARD" ;;
run_calibrate)
  GPU=$((count - 1)) alone python3 -m stackrace calibrate ladder=quick hardware="$CARD" out="$WORK/calibration.json" ;;
mend)
  mend ;;
trial)
  on_a_card; copy; in_background "trial-$2" bash "$VISIT/visit.sh" run_trial "${@:2}" ;;
run_trial)
  bench sweep=trial backend="$2" concurrency=4 repeat=0 verify=none common.kv_cache_memory_bytes=2147483648 "${@:3}" ;;
race)
  on_a_card; copy; in_background "race-$GPU" bash "$VISIT/visit.sh" run_sweeps "${@:3}"; wait_for "race-$GPU" "$2" ;;
run_sweeps)
  for name in ${2//,/ }; do # one that fails does not take the next along; a trial's parser has read the flags
    read -ra asked <<<"${SWEEPS[$name]}"; bench ++backend.check_flags=false "${asked[@]}" "${@:3}" || echo "$name: exit code $?"
  done ;;
all)
  on_a_card; copy; in_background all bash "$VISIT/visit.sh" run_all ;;
run_all)
  bash "$VISIT/visit.sh" mend || echo "vLLM is not mended" # the other sweeps go on
  wait_for_model
  case $count in
  1) go 0 3600 "first repeat=0" mla_off rates context attention ;;
  2 | 3)
    (in_turn 0; go 0 3600 context attention) & (in_turn 1; go 1 3600 mla_off rates) & wait ;;
  *)
    for k in 0 1 2 3; do in_turn $k & done; wait
    open="arrival.rate=32,24,40,16,48,8 repeat=0" long="lengths.input.tokens=8192,32000 repeat=0"
    go 0 3600 "mended repeat=0" "context backend=sglang_hopper $long" &
    go 1 3600 "context backend=vllm_hopper $long" \
      "attention sweep=$CARD-attention-again backend=vllm_flashmla_hopper,vllm_triton_hopper concurrency=16 repeat=0" &
    go 2 3600 "rates backend=sglang_hopper $open" &
    go 3 3600 "rates backend=vllm_hopper $open" & wait ;;
  esac ;;
wait)
  wait_for "$2" "$3" ;;
state)
  nvidia-smi --query-gpu=index,name,driver_version,memory.used,power.draw,power.limit,clocks.sm,clocks.mem,temperature.gpu,clocks_event_reasons.active --format=csv
  nvidia-smi topo -m; lscpu | grep -iE 'model name|thread|socket|numa' # whether the GPUs' shares of the cores are alike
  nvidia-smi --query-compute-apps=pid,used_memory --format=csv,noheader; nproc; free -g | head -2; df -h /dev/shm | tail -1 ;;
pack) # what runs may grow meanwhile: tar's exit code 1
  (cd "$WORK" && { tar -cf - --exclude=schedule.parquet results ./*.log || [ $? = 1 ]; }) | gzip -6 | split -d -b 15M - "$2."; ls -l "$2".* ;;
curate)
  published=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd); tmp=$(mktemp -d); cat "$2".* | tar -xz -C "$tmp"
  for sweep in $(cd "$tmp/results" && ls -d gpu*/*/ | xargs -n1 basename | sort -u); do
    runs=$(grep -ls '"status": "ok"' "$tmp"/results/gpu*/"$sweep"/*/run.json || true); [ -n "$runs" ] || continue
    there=$published/$sweep
    if [ -e "$there/runs" ] && [[ " ${*:3} " != *" $sweep "* ]]; then echo "$sweep is published: name it to replace it"; continue; fi
    rm -rf "$there/runs"; mkdir -p "$there/runs"
    for run in $runs; do
      key=$(dirname "$run"); mkdir "$there/runs/${key##*/}"
      cp "$key"/{run.json,config.yaml,requests.parquet} "$there/runs/${key##*/}/"
      [ ! -e "$key/telemetry.parquet" ] || cp "$key/telemetry.parquet" "$there/runs/${key##*/}/"
    done
    sed -i 's#/[^" :]*/visit\b#~/visit#g; s#"/[^" ]*/bin/python3"#"python3"#g' "$there"/runs/*/{run.json,config.yaml}
    stackrace report "$there/runs" -o "$there/report.html"
  done
  rm -rf "$tmp" ;;
*)
  sed -n '2,26s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
