# shellcheck shell=bash
# Runs one recipe: reads the flags, finds a Python, runs run_glue.py on one device or on ranks, and prints the final
# lines. Sourced by the launchers, which set
#   NETWORK     folder of the model in the repository's root, if it exists
#   HUB_NAME    the same model on the hub
#   CASE        acc (train and evaluate) or perf (train only)
#   RECIPE      a recipe of configs/, unless --recipe names another
#   CHANGES     flags that this launcher changes in RECIPE, as an array; another recipe is used unchanged
#   FLAGS       flags of run_glue.py for any recipe, as an array
#   EPOCHS      default number of epochs; base: as published for bert-base-cased; unset: the recipe's
#   RANKS       default number of ranks on this host; unset: one process without torch's elastic launcher
#   TASK        default task, if any
#   HOSTS       set if ranks may run on several hosts
# and call `launch "$@"`.

unset RANKS CHANGES TASK HOSTS # ignore the environment's: a scheduler may set its own
EPOCHS=""
LIB=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$LIB")
# shellcheck source=test/setup_python.sh
source "$LIB/setup_python.sh"
# shellcheck source=test/env_npu.sh
source "$LIB/env_npu.sh"
# shellcheck source=test/launch_ranks.sh
source "$LIB/launch_ranks.sh"

CHOICES=(--TASK --train_epochs --model --batch_size --device --data_path --output_dir --sample --help)
ACC_CHOICES=(--recipe)
PERF_CHOICES=(--baseline)

case_usage() {
  if [[ $CASE == perf ]]; then
    echo "  --baseline=FILE      perf.json of an earlier run; exit code 9 if this run is more than 5 % slower"
  else
    echo "  --recipe=NAME        stable (recommended) or a config file; default: $RECIPE (as published)"
  fi
}

usage() {
  local devices="0, npu:1, cuda, cpu, ..." epochs="the recipe's"
  [[ -z $EPOCHS ]] || epochs=${EPOCHS/base/as published}
  [[ -z ${RANKS:-} ]] || devices="npu, cuda or cpu; each rank uses its own"
  cat <<TEXT
bash ${0} --TASK=<task> [--sample] [flags] [-- flags of run_glue.py]

  --TASK=NAME          GLUE task, e.g. mrpc${TASK:+; default: $TASK}
  --sample             use generated sample data (not GLUE), and a tiny BERT without --model; no network
  --model=NAME         folder or hub name; default: ./$NETWORK, else $HUB_NAME
  --data_path=FOLDER   local data; default: the hub's
  --train_epochs=N     default: $epochs
  --batch_size=N       samples per device; default: the recipe's (32 as published)
  --device=NAME        $devices; default: the best available
  --output_dir=FOLDER  default: test/output/<task>/<model>_<ranks>p_$CASE, with _sample behind it for --sample
$(case_usage; rank_usage)
Exit codes: 2 usage, 3 data, 4 environment or device, 5 diverged, 6 disk, 7 a rank failed,
8 a bound of --expect was missed, 9 slower than the baseline, 130/143 signals.
TEXT
}

unknown_flag() {
  local choice hint="" near="" plain wanted=${1//[-_]/}
  wanted=${wanted,,}
  for choice in "${CHOICES[@]}"; do
    plain=${choice//[-_]/}
    plain=${plain,,}
    # --epochs and --num_train_epochs are --train_epochs; --modl may be --model
    if [[ $plain == *"$wanted"* || $wanted == *"$plain" || $wanted == "$plain"* ]]; then
      hint=$choice
    elif [[ ${plain:0:3} == "${wanted:0:3}" ]]; then
      near=$choice
    fi
  done
  hint=${hint:-$near}
  fail 2 "unknown flag $1.${hint:+ Did you mean $hint?} Choices: ${CHOICES[*]}; put flags of run_glue.py after --"
}

parse_flags() { # fills SETTING (by flag), SAMPLE and EXTRA (flags of run_glue.py)
  declare -gA SETTING=()
  declare -g SAMPLE=""
  declare -ga EXTRA=()
  local flag value
  while (($#)); do
    case $1 in
      --)
        EXTRA=("${@:2}")
        [[ " ${EXTRA[*]}" != *" --output_dir"* ]] || fail 2 "put --output_dir before --"
        return
        ;;
      --help | -h) usage && exit 0 ;;
      --sample) SAMPLE=yes && shift && continue ;;
    esac
    flag=${1%%=*}
    [[ " ${CHOICES[*]} " == *" $flag "* && $flag == --* ]] || unknown_flag "$flag"
    [[ $1 == --sample=* || $1 == --help=* ]] && fail 2 "$flag takes no value"
    if [[ $1 == *=* ]]; then
      value=${1#*=}
      shift
    else
      (($# >= 2)) || fail 2 "$flag needs a value"
      value=$2
      shift 2
    fi
    [[ -n $value ]] || fail 2 "$flag needs a value"
    SETTING[${flag#--}]=$value
  done
}

extra_value() { # extra_value <flag of run_glue.py> <default>: its value after --, the last one
  local at value=$2
  for ((at = 0; at < ${#EXTRA[@]}; at++)); do
    case ${EXTRA[at]} in
      "--$1") value=${EXTRA[at + 1]:-$2} ;;
      "--$1="*) value=${EXTRA[at]#*=} ;;
    esac
  done
  printf '%s' "$value"
}

check_settings() { # checks before the installation, which takes minutes; run_glue.py checks the rest
  local number='^[0-9]+(\.[0-9]+)?$' answer
  [[ ${SETTING[batch_size]:-32} =~ ^[1-9][0-9]*$ ]] || fail 2 "--batch_size: ${SETTING[batch_size]} is not a number >= 1"
  [[ ${SETTING[train_epochs]:-1} =~ $number ]] || fail 2 "--train_epochs: ${SETTING[train_epochs]} is not a number > 0"
  [[ -z ${SETTING[data_path]:-} || -d ${SETTING[data_path]} ]] ||
    fail 3 "--data_path: the folder ${SETTING[data_path]} does not exist"
  check_rank_settings
  base_python
  if [[ -n ${SETTING[baseline]:-} ]]; then
    SETTING[baseline]=$(realpath -m -- "${SETTING[baseline]}")
    (cd "$ROOT" && "$BASE_PYTHON" -m bert_glue.launch.results baseline "${SETTING[baseline]}") || exit $?
  fi
  answer=$(cd "$ROOT" && "$BASE_PYTHON" -m bert_glue.launch.results task "${SETTING[TASK]:-${TASK:-}}" \
    --recipe "${SETTING[recipe]:-$RECIPE}") || exit $?
  read -r TASK BASE_EPOCHS <<<"$answer"
}

model_name() { # the model's own name, for the output folder: runs of different models must not share one
  local name=${SETTING[model]:-$NETWORK}
  [[ -z $SAMPLE || -n ${SETTING[model]:-} ]] || name=tiny
  [[ ! -d $name ]] || name=$(cd -- "$name" && pwd)
  name=${name%/}
  name=${name##*/}
  printf '%s' "${name//[^A-Za-z0-9.-]/_}"
}

build_command() { # fills COMMAND and OUTPUT
  local model=${SETTING[model]:-} epochs=${SETTING[train_epochs]:-} batch=${SETTING[batch_size]:-}
  OUTPUT=${SETTING[output_dir]:-$LIB/output/$TASK/$(model_name)_$((NPROC * NNODES))p_$CASE${SAMPLE:+_sample}}
  COMMAND=("$ROOT/run_glue.py" --task_name "$TASK" --output_dir "$OUTPUT" "${FLAGS[@]}"
    --recipe "${SETTING[recipe]:-$RECIPE}")
  if [[ -z ${SETTING[recipe]:-} || ${SETTING[recipe]} == "$RECIPE" ]]; then
    COMMAND+=(${CHANGES[@]+"${CHANGES[@]}"})
    # A tiny BERT learns nothing with the published learning rate and epochs: run_glue.py has its own for --sample.
    [[ -n $SAMPLE ]] || epochs=${epochs:-${EPOCHS/base/$BASE_EPOCHS}}
  fi
  if [[ -n $SAMPLE ]]; then
    COMMAND+=(--sample)
  else
    if [[ -z $model && -d $ROOT/$NETWORK ]]; then model=$ROOT/$NETWORK; fi
    model=${model:-$HUB_NAME}
  fi
  [[ -z $model ]] || COMMAND+=(--model_name_or_path "$model")
  [[ -z $epochs ]] || COMMAND+=(--num_train_epochs "$epochs")
  [[ -z $batch ]] || COMMAND+=(--per_device_train_batch_size "$batch" --per_device_eval_batch_size "$batch")
  [[ -z ${SETTING[device]:-} ]] || COMMAND+=(--device "${SETTING[device]}")
  [[ -z ${SETTING[data_path]:-} ]] || COMMAND+=(--data_path "${SETTING[data_path]}")
  COMMAND+=(${EXTRA[@]+"${EXTRA[@]}"})
}

preload_libgomp() { # aarch64: a libgomp loaded late finds no room for its thread-local data and fails
  local packages library
  [[ $(uname -m) == aarch64 ]] || return 0
  packages=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
  for library in "$packages"/{scikit_learn.libs,torch.libs,torch/lib}/libgomp*.so*; do
    [[ -f $library && ":${LD_PRELOAD:-}:" != *":$library:"* ]] || continue
    export LD_PRELOAD=$library${LD_PRELOAD:+:$LD_PRELOAD}
  done
}

run_and_log() { # run_and_log <log> <command>...: screen and log get all output; the command's status
  local log=$1 child loggers=() status=0
  shift
  mkfifo "$SCRATCH/out" "$SCRATCH/err"
  # The loggers outlive every signal, so that the last words of the command are not lost.
  (trap '' INT TERM HUP QUIT USR1 && exec tee -a "$log" <"$SCRATCH/out") &
  loggers+=($!)
  (trap '' INT TERM HUP QUIT USR1 && exec tee -a "$log" <"$SCRATCH/err" >&2) &
  loggers+=($!)
  trap 'SIGNALLED=2; kill -INT "$child" 2>/dev/null || true' INT
  trap 'SIGNALLED=15; kill -TERM "$child" 2>/dev/null || true' TERM HUP QUIT USR1 # Slurm warns with USR1
  # A process group of its own (set -m): else bash starts background commands with SIGINT ignored.
  set -m
  "$@" >"$SCRATCH/out" 2>"$SCRATCH/err" &
  child=$!
  set +m
  # `wait` returns early for a trapped signal, so the command's own status may only come from the last one.
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
  wait "$child" || status=$?
  trap - INT TERM HUP QUIT USR1
  kill -KILL -- "-$child" 2>/dev/null || true # any child left behind would keep the log open
  wait "${loggers[@]}" || true
  if ((status == 0 && SIGNALLED)); then status=$((128 + SIGNALLED)); fi
  return "$status"
}

device_id() { # for names of files and folders: the number in --device, else ASCEND_DEVICE_ID, else 0; cpu for the CPU
  local id=${SETTING[device]:-}
  id=${id##*:}
  [[ $id =~ ^([0-9]+|cpu)$ ]] || id=${ASCEND_DEVICE_ID:-0}
  [[ $id =~ ^([0-9]+|cpu)$ ]] || id=0
  printf '%s' "$id"
}

link_outputs() { # scripts written for the reference read test/output/<device id>: it leads to the newest run's folder
  local link
  link=$LIB/output/$(device_id)
  [[ -z ${SETTING[output_dir]:-} && $NODE_RANK == 0 ]] || return 0
  [[ -e $link && ! -L $link ]] || ln -sfn -- "${OUTPUT#"$LIB/output/"}" "$link" 2>/dev/null || true
}

run_one() { # one process
  local log status=0
  log=$OUTPUT/train_$(device_id).log
  keep_previous "$log"
  run_and_log "$log" "$PYTHON" "${COMMAND[@]}" || status=$?
  if ((status)); then
    echo "error: run_glue.py stopped with exit code $status; see its output in $log" >&2
    exit "$status"
  fi
}

run_ranks() { # one process per rank
  local first=$((NODE_RANK * NPROC)) rank status=0 log
  for ((rank = first; rank < first + NPROC; rank++)); do keep_previous "$OUTPUT/train_rank_$rank.log"; done
  if ((first == 0)); then # the name of the reference
    log=$OUTPUT/train_$(device_id).log
    [[ -L $log ]] || keep_previous "$log"
    ln -sfn train_rank_0.log "$log" 2>/dev/null || true
  fi
  elastic_command
  run_and_log "$OUTPUT/train_rank_$first.log" start_ranks "$PYTHON" "${COMMAND[@]}" || status=$?
  judge_ranks "$status" || exit $?
}

keep_previous() { # a link too, also one to nothing: what it points to is not ours
  [[ ! -e $1 && ! -L $1 ]] || mv -fT -- "$1" "$1.previous"
}

prepare_python() { # sets PYTHON; on a machine with an NPU, one with torch_npu
  # shellcheck disable=SC2144
  if [[ -e /dev/davinci0 || -e /dev/davinci_manager ]]; then
    setup_python requirements/npu.txt
  else
    setup_python requirements.txt
  fi
}

launch() {
  [[ -z ${RANKS:-} ]] || CHOICES+=("${RANK_CHOICES[@]}")
  [[ -z ${HOSTS:-} ]] || CHOICES+=("${HOST_CHOICES[@]}")
  if [[ $CASE == perf ]]; then CHOICES+=("${PERF_CHOICES[@]}"); else CHOICES+=("${ACC_CHOICES[@]}"); fi
  parse_flags "$@"
  check_settings
  local group_timeout
  group_timeout=$(extra_value ddp_timeout 1800)
  [[ $group_timeout =~ ^[1-9][0-9]*$ ]] || fail 2 "--ddp_timeout: $group_timeout is not a number of seconds >= 1"
  npu_environment "$group_timeout"
  prepare_python
  build_command
  preload_libgomp
  mkdir -p -- "$OUTPUT" || fail 6 "--output_dir: $OUTPUT cannot be created"
  link_outputs
  export PYTHONUNBUFFERED=1
  SIGNALLED=0
  SCRATCH=$(mktemp -d)
  trap 'rm -r -- "$SCRATCH"' EXIT
  if [[ -n ${RANKS:-} ]]; then run_ranks; else run_one; fi
  ((NODE_RANK == 0)) || return 0 # the first host has the results
  OUTPUT=$(cd "$OUTPUT" && pwd)
  local baseline=()
  [[ -z ${SETTING[baseline]:-} ]] || baseline=(--baseline "${SETTING[baseline]}")
  (cd "$ROOT" && "$PYTHON" -m bert_glue.launch.results report "$OUTPUT" --case "$CASE" ${baseline[@]+"${baseline[@]}"})
}
