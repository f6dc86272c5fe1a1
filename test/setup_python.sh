# shellcheck shell=bash disable=SC2034
# Finds a python with the pinned requirements or makes one in .venv; sourced by the launchers.
#
#   base_python                  sets BASE_PYTHON: any Python >= 3.11, enough for the standard library
#   setup_python FILE...         sets PYTHON: has what the requirements files pin
#
# Order: $BERT_GLUE_PYTHON (used or refused), python3 and python of the PATH (an activated conda, NPU or
# virtual environment is used as it is), .venv, and only then an installation into .venv.

fail() { # fail <exit code> <message>
  printf 'error: %s\n' "$2" >&2
  exit "$1"
}

lacks() { # lacks <python> <requirements file>...: prints what is missing; status of doctor.requirements
  local python=$1
  shift
  (cd "$ROOT" && "$python" -m bert_glue.doctor.requirements "$@" 2>/dev/null)
}

base_python() {
  local name
  for name in "${BERT_GLUE_PYTHON:-python3}" python python3.11 python3.12 python3.13; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      BASE_PYTHON=$(command -v -- "$name")
      return
    fi
  done
  fail 4 "Python 3.11 or newer is needed, and neither python3 nor python3.11 on the PATH is one"
}

setup_python() {
  local name missing="" status venv=$ROOT/.venv
  if [[ -n ${BERT_GLUE_PYTHON:-} ]]; then
    missing=$(lacks "$BERT_GLUE_PYTHON" "$@") || fail 4 "BERT_GLUE_PYTHON lacks ${missing:-a working python}"
    PYTHON=$BERT_GLUE_PYTHON
    return
  fi
  for name in python3 python; do
    command -v "$name" >/dev/null || continue
    status=0
    missing=$(lacks "$name" "$@") || status=$?
    if ((status == 0)); then
      PYTHON=$(command -v "$name")
      return
    elif ((status == 3)); then # a .venv without its torch_npu would quietly train on the host
      fail 4 "this environment has torch_npu but lacks $missing; install into it: $name -m pip install ${*/#/-r }"
    fi
  done
  PYTHON=$venv/bin/python
  is_ready "$venv" "$@" && return
  base_python
  # The lock is an open file, so that it dies with the last process that holds it, pip included.
  local lock
  exec {lock}<>"$ROOT/requirements.txt" || fail 4 "cannot write to $ROOT; give BERT_GLUE_PYTHON or activate one"
  "$BASE_PYTHON" - "$lock" <<'PYTHON'
import fcntl, sys
try:
    fcntl.flock(int(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("setup: waiting for another launch that is installing into .venv", file=sys.stderr)
    fcntl.flock(int(sys.argv[1]), fcntl.LOCK_EX)
except OSError as error:
    print(f"setup: no file locks here ({error}); do not start two launches now", file=sys.stderr)
PYTHON
  is_ready "$venv" "$@" || install "$venv" "${missing:-a Python >= 3.11}" "$@"
  exec {lock}>&-
}

is_ready() { # is_ready <venv> <requirements file>...
  local venv=$1
  shift
  [[ ! -e $venv/.installing ]] && lacks "$venv/bin/python" "$@" >/dev/null
}

install() { # install <venv> <what python3 lacks> <requirements file>...; the caller holds the lock
  local venv=$1 missing=$2 file
  local -a files=()
  shift 2
  for file in "$@"; do files+=(-r "$ROOT/$file"); done
  missing="python3 lacks $missing"
  if [[ -e $venv/.installing ]]; then
    missing="an installation was cut off"
  elif [[ -x $venv/bin/python ]]; then
    missing=".venv lacks $(lacks "$venv/bin/python" "$@" || true)"
  fi
  echo "setup: $missing; installing into .venv (once; 2 to 10 minutes)" >&2
  # The file stays if we are killed, and tells the next launch that pip may have left half a package: pip takes it for
  # a whole one, so the environment is made anew. Without its python it is no environment until that is done.
  [[ ! -e $venv/.installing ]] || rm -f "$venv/bin/python"
  if ! "$venv/bin/python" -c '' 2>/dev/null; then
    "$BASE_PYTHON" -m venv --clear --without-pip "$venv" >&2 || fail 4 "$BASE_PYTHON cannot make $venv"
  fi
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    : >"$venv/.installing"
    "$venv/bin/python" -m ensurepip >/dev/null ||
      fail 4 "$BASE_PYTHON has no pip for a virtual environment (Debian, Ubuntu: apt install python3-venv)"
  fi
  : >"$venv/.installing"
  if ! "$venv/bin/python" -m pip install --quiet --no-input "${files[@]}" >"$venv/pip.log" 2>&1; then
    tail -n 15 "$venv/pip.log" >&2
    fail 4 "pip could not install the requirements; all of its output: $venv/pip.log"
  fi
  rm -f "$venv/.installing"
}
