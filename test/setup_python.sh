# shellcheck shell=bash disable=SC2034
# Finds a Python that can run this program, or creates an environment for it. The launchers source this file.
#
#   base_python                  sets BASE_PYTHON to any Python >= 3.10, which is enough for the standard library
#   setup_python FILE...         sets PYTHON to a Python with the packages of the requirements files
#
# The order is: $BERT_GLUE_PYTHON (used or refused), then python3 and python of the PATH, such as those of an activated
# conda, NPU or virtual environment. If such a Python has torch but lacks other packages, .venv-system adds these on top
# without changing the environment. If it has no torch, .venv gets the tested set.

fail() { # fail <exit code> <message>
  printf 'error: %s\n' "$2" >&2
  exit "$1"
}

requirements() { # requirements <python> [--specs | --command] <requirements file>...
  local python=$1
  shift
  (cd "$ROOT" && "$python" -m bert_glue.launch.requirements "$@" 2>/dev/null)
}

base_python() {
  local name
  for name in "${BERT_GLUE_PYTHON:-python3}" python python3.11 python3.12 python3.13 python3.10; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
      BASE_PYTHON=$(command -v -- "$name")
      return
    fi
  done
  fail 4 "Python 3.10 or newer is needed, but the PATH has none; install one, or set BERT_GLUE_PYTHON"
}

setup_python() {
  local name missing="" status
  if [[ -n ${BERT_GLUE_PYTHON:-} ]]; then
    missing=$(requirements "$BERT_GLUE_PYTHON" "$@") ||
      fail 4 "BERT_GLUE_PYTHON lacks ${missing:-a working python}$(remedy "$BERT_GLUE_PYTHON" "$@")"
    PYTHON=$BERT_GLUE_PYTHON
    return
  fi
  for name in python3 python; do
    command -v "$name" >/dev/null || continue
    status=0
    missing=$(requirements "$name" "$@") || status=$?
    if ((status == 0)); then
      PYTHON=$(command -v "$name")
      return
    elif ((status == 3)); then # a .venv would not have its torch, and would train on the host without a warning
      BASE_PYTHON=$(command -v "$name")
      if "$name" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'; then
        fail 4 "this virtual environment has torch but lacks $missing$(remedy "$name" "$@")"
      fi
      build "$ROOT/.venv-system" "$missing" "$@"
      return
    fi
  done
  base_python
  build "$ROOT/.venv" "${missing:-a Python >= 3.10}" "$@"
}

remedy() { # remedy <python> <requirements file>...: the end of a message, with the command to run
  local command
  if command=$(requirements "$1" --command "${@:2}"); then
    printf '; install it with: %s' "$command"
  elif [[ -n $command ]]; then
    printf '; %s' "$command"
  fi
}

build() { # build <venv> <what BASE_PYTHON lacks> <requirements file>...: sets PYTHON, installs once
  local venv=$1 missing=$2
  shift 2
  PYTHON=$venv/bin/python
  is_ready "$venv" "$@" && return
  # The lock is an open file, so it is released when the last process that holds it ends, including pip.
  local lock
  exec {lock}<>"$ROOT/requirements.txt" || fail 4 "cannot write to $ROOT; set BERT_GLUE_PYTHON or activate an environment"
  "$BASE_PYTHON" - "$lock" "${venv##*/}" <<'PYTHON'
import fcntl, sys
try:
    fcntl.flock(int(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print(f"setup: waiting for another launch that is installing into {sys.argv[2]}", file=sys.stderr)
    fcntl.flock(int(sys.argv[1]), fcntl.LOCK_EX)
except OSError as error:
    print(f"setup: this file system has no locks ({error}); do not start a second launch now", file=sys.stderr)
PYTHON
  is_ready "$venv" "$@" || install "$venv" "$missing" "$@"
  exec {lock}>&-
}

is_ready() { # is_ready <venv> <requirements file>...
  local venv=$1
  shift
  [[ ! -e $venv/.installing ]] && stands_on_base "$venv" && requirements "$venv/bin/python" "$@" >/dev/null
}

stands_on_base() { # stands_on_base <venv>: true for .venv; for .venv-system only if BASE_PYTHON has created it
  [[ $1 != *-system ]] || [[ $("$1/bin/python" -c "$PREFIX" 2>/dev/null) == $("$BASE_PYTHON" -c "$PREFIX") ]]
}
PREFIX='import sys; print(sys.base_prefix)'

install() { # install <venv> <what BASE_PYTHON lacks> <requirements file>...; the caller holds the lock
  local venv=$1 missing=$2 specs file
  local -a system=() files=()
  shift 2
  for file in "$@"; do files+=(-r "$ROOT/$file"); done
  missing="${BASE_PYTHON##*/} lacks $missing"
  if [[ -e $venv/.installing ]]; then
    missing="an earlier installation was interrupted"
  elif [[ $venv == *-system ]]; then
    system=(--system-site-packages)
    stands_on_base "$venv" || rm -f "$venv/bin/python"
  elif [[ -x $venv/bin/python ]]; then
    missing="${venv##*/} lacks $(requirements "$venv/bin/python" "$@" || true)"
  fi
  echo "setup: $missing; installing into ${venv##*/} (once; 2 to 10 minutes)" >&2
  # The file stays if this process is killed. It tells the next launch that a package may be incomplete, which pip does not
  # notice, so the environment is created again. Its python is removed first, so that nobody uses it meanwhile.
  [[ ! -e $venv/.installing ]] || rm -f "$venv/bin/python"
  if ! "$venv/bin/python" -c '' 2>/dev/null; then
    "$BASE_PYTHON" -m venv --clear --without-pip ${system[@]+"${system[@]}"} "$venv" >&2 ||
      fail 4 "$BASE_PYTHON cannot create $venv"
  fi
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    : >"$venv/.installing"
    "$venv/bin/python" -m ensurepip >/dev/null ||
      fail 4 "$BASE_PYTHON has no pip for a virtual environment (Debian, Ubuntu: apt install python3-venv)"
  fi
  : >"$venv/.installing"
  # Install the tested set, except on top of another torch, and for Python 3.10, for which it has no versions.
  if [[ $venv == *-system ]] || "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info >= (3, 11))'; then
    specs=$(requirements "$venv/bin/python" --specs "$@") || fail 4 "${specs:-$venv/bin/python does not run}"
    printf '%s\n' "$specs" >"$venv/specs.txt"
    files=(-r "$venv/specs.txt")
  fi
  if ! "$venv/bin/python" -m pip install --quiet --no-input "${files[@]}" >"$venv/pip.log" 2>&1; then
    tail -n 15 "$venv/pip.log" >&2
    fail 4 "pip could not install the requirements; its full output is in $venv/pip.log"
  fi
  rm -f "$venv/.installing"
}
