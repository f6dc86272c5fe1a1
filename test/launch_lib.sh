# shellcheck shell=bash
# Runs one recipe: flags, python, run_glue.py, final lines. Sourced by the launchers, which set
#   NETWORK     folder in the repository's root, if it is there
#   HUB_NAME    the same model on the hub
#   CASE        acc (train and evaluate) or perf (train only)
#   EPOCHS      default number of epochs; empty: the published one of the task
#   RECIPE      flags of run_glue.py, as an array
# and call `launch "$@"`.

LIB=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$LIB")
# shellcheck source=test/setup_python.sh
source "$LIB/setup_python.sh"
# shellcheck source=test/env_npu.sh
source "$LIB/env_npu.sh"

CHOICES=(--TASK --train_epochs --model --batch_size --device --data_path --output_dir --sample --help)

usage() {
  cat <<TEXT
bash ${0} --TASK=<task> [--sample] [flags] [-- flags of run_glue.py]

  --TASK=NAME          GLUE task, e.g. mrpc
  --sample             generated sample data (not GLUE) and a tiny BERT, if no --model is given; no network
  --model=NAME         folder or hub name; default: ./$NETWORK, else $HUB_NAME
  --data_path=FOLDER   data on this machine; default: the hub's
  --train_epochs=N     default: ${EPOCHS:-as published for the task}
  --batch_size=N       samples per device; default: 32
  --device=NAME        0, npu:1, cuda, cpu, ...; default: the best there is
  --output_dir=FOLDER  default: test/output/<task>/1p
Exit codes: 2 usage, 3 data, 4 environment or device, 5 diverged, 6 disk, 7 a rank failed,
8 a bound of --expect missed, 130/143 signals.
TEXT
}

unknown_flag() {
  local choice hint="" plain wanted=${1//[-_]/}
  for choice in "${CHOICES[@]}"; do
    plain=${choice//[-_]/}
    [[ ${plain,,} == *"${wanted,,}"* || ${plain:0:4} == "${wanted:0:4}" ]] && hint=" Did you mean $choice?"
  done
  fail 2 "unknown flag $1.$hint Choices: ${CHOICES[*]}; flags of run_glue.py go after --"
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
        [[ " ${EXTRA[*]}" != *" --output_dir"* ]] || fail 2 "--output_dir goes before --"
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

check_settings() { # what can be known before an installation of minutes; run_glue.py checks the rest
  local number='^[0-9]+(\.[0-9]+)?$' answer
  [[ ${SETTING[batch_size]:-32} =~ ^[1-9][0-9]*$ ]] || fail 2 "--batch_size: ${SETTING[batch_size]} is no number >= 1"
  [[ ${SETTING[train_epochs]:-1} =~ $number ]] || fail 2 "--train_epochs: ${SETTING[train_epochs]} is no number > 0"
  [[ -z ${SETTING[data_path]:-} || -d ${SETTING[data_path]} ]] ||
    fail 3 "--data_path: there is no folder ${SETTING[data_path]}"
  base_python
  answer=$(cd "$ROOT" && "$BASE_PYTHON" -m bert_glue.launch_results task "${SETTING[TASK]:-}") || exit $?
  read -r TASK PUBLISHED_EPOCHS <<<"$answer"
}

build_command() { # fills COMMAND and OUTPUT
  local batch=${SETTING[batch_size]:-32} model=${SETTING[model]:-} epochs=${SETTING[train_epochs]:-}
  OUTPUT=${SETTING[output_dir]:-$LIB/output/$TASK/1p}
  COMMAND=("$ROOT/run_glue.py" --task_name "$TASK" --output_dir "$OUTPUT" "${RECIPE[@]}"
    --per_device_train_batch_size "$batch" --per_device_eval_batch_size "$batch")
  if [[ -n $SAMPLE ]]; then
    # Learning rate and epochs of the published recipe teach a tiny BERT nothing: run_glue.py has its own.
    COMMAND+=(--sample)
  else
    if [[ -z $model && -d $ROOT/$NETWORK ]]; then model=$ROOT/$NETWORK; fi
    model=${model:-$HUB_NAME}
    epochs=${epochs:-${EPOCHS:-$PUBLISHED_EPOCHS}}
    COMMAND+=(--learning_rate 2e-5)
  fi
  [[ -z $model ]] || COMMAND+=(--model_name_or_path "$model")
  [[ -z $epochs ]] || COMMAND+=(--num_train_epochs "$epochs")
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
  local log=$1 pipes child loggers=() status=0 signal=0
  shift
  pipes=$(mktemp -d)
  mkfifo "$pipes/out" "$pipes/err"
  # The loggers outlive every signal, so that the last words of the command are not lost.
  (trap '' INT TERM HUP && exec tee -a "$log" <"$pipes/out") &
  loggers+=($!)
  (trap '' INT TERM HUP && exec tee -a "$log" <"$pipes/err" >&2) &
  loggers+=($!)
  trap 'signal=2; kill -INT "$child" 2>/dev/null || true' INT
  trap 'signal=15; kill -TERM "$child" 2>/dev/null || true' TERM HUP
  # A process group of its own (set -m): else bash starts background commands with SIGINT ignored.
  set -m
  "$@" >"$pipes/out" 2>"$pipes/err" &
  child=$!
  set +m
  # `wait` returns early for a trapped signal, so the command's own status may only come from the last one.
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
  wait "$child" || status=$?
  trap - INT TERM HUP
  kill -KILL -- "-$child" 2>/dev/null || true # whatever it left behind would hold the log open
  wait "${loggers[@]}" || true
  rm -r -- "$pipes"
  if ((status == 0 && signal)); then status=$((128 + signal)); fi
  return "$status"
}

prepare_python() { # sets PYTHON; where there is an NPU, one with torch_npu
  # shellcheck disable=SC2144
  if [[ -e /dev/davinci0 || -e /dev/davinci_manager ]]; then
    setup_python requirements-npu.txt
  else
    setup_python requirements.txt
  fi
}

launch() {
  parse_flags "$@"
  check_settings
  npu_environment
  prepare_python
  build_command
  preload_libgomp
  mkdir -p -- "$OUTPUT" || fail 6 "--output_dir: cannot make $OUTPUT"
  local log device=${SETTING[device]:-0} status=0
  log=$OUTPUT/train_${device//[^A-Za-z0-9]/_}.log
  [[ ! -e $log ]] || mv -f -- "$log" "$log.previous"
  export PYTHONUNBUFFERED=1
  run_and_log "$log" "$PYTHON" "${COMMAND[@]}" || status=$?
  if ((status)); then
    echo "error: run_glue.py stopped with exit code $status; its output: $log" >&2
    exit "$status"
  fi
  OUTPUT=$(cd "$OUTPUT" && pwd)
  (cd "$ROOT" && "$PYTHON" -m bert_glue.launch_results report "$OUTPUT" --case "$CASE")
}
