# shellcheck shell=bash disable=SC2034
# Runs several ranks: their flags, and torch's elastic launcher on this host. Sourced by launch_lib.sh.

RANK_CHOICES=(--nproc)
HOST_CHOICES=(--nnodes --node_rank --master_addr --master_port)

rank_usage() {
  [[ -z ${RANKS:-} ]] || cat <<TEXT
  --nproc=N            ranks on this host; default: $RANKS
TEXT
  [[ -z ${HOSTS:-} ]] || cat <<TEXT
  --nnodes=N           number of hosts; start this launcher once on each, with one shared --output_dir
  --node_rank=N        0 to nnodes - 1; 0 on the host of --master_addr
  --master_addr=NAME   name or address of the first host
  --master_port=N      default: 29500
TEXT
}

check_rank_settings() { # sets NPROC, NNODES and NODE_RANK
  local counts='^[1-9][0-9]{0,4}$' device=${SETTING[device]:-} node=${SETTING[node_rank]:-0} port=${SETTING[master_port]:-29500}
  NPROC=${SETTING[nproc]:-${RANKS:-1}} NNODES=${SETTING[nnodes]:-1}
  [[ $NPROC =~ $counts ]] || fail 2 "--nproc: $NPROC is not a number >= 1"
  [[ $NNODES =~ $counts ]] || fail 2 "--nnodes: $NNODES is not a number >= 1"
  NODE_RANK=$node
  if [[ ! $node =~ ^(0|[1-9][0-9]{0,4})$ ]] || ((node >= NNODES)); then
    fail 2 "--node_rank: $node is not one of 0 to $((NNODES - 1)) (--nnodes $NNODES)"
  fi
  if [[ ! $port =~ $counts ]] || ((port > 65535)); then fail 2 "--master_port: $port is not a port"; fi
  [[ $NNODES == 1 || -n ${SETTING[master_addr]:-} ]] || fail 2 "--nnodes $NNODES needs --master_addr"
  [[ -z ${RANKS:-} || $device != *:* ]] ||
    fail 2 "--device $device: each rank uses its own device; give ${device%%:*}"
}

use_network_of() { # use_network_of <first host>: ranks communicate over the interface that leads there
  local address interface
  read -r address interface < <("$PYTHON" "$ROOT/bert_glue/launch/ranks.py" network "$1") ||
    fail 4 "--master_addr $1: the host does not exist or cannot be reached"
  [[ -z $interface ]] || export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
  [[ -z $interface ]] || export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
  [[ -n ${HCCL_SOCKET_IFNAME:-} ]] || export HCCL_IF_IP=${HCCL_IF_IP:-$address}
}

elastic_command() { # fills ELASTIC: torch's launcher; the command of a rank must follow
  local group_timeout below=(below)
  group_timeout=$(extra_value ddp_timeout 1800)
  ((NNODES == 1)) || below=(meet "$SCRATCH" "$group_timeout")
  ELASTIC=("$PYTHON" "$ROOT/bert_glue/launch/ranks.py" "${below[@]}"
    "$PYTHON" -m torch.distributed.run --nproc-per-node="$NPROC" --max-restarts=0 --monitor-interval=0.1)
  if ((NNODES > 1)); then
    use_network_of "${SETTING[master_addr]}"
    ELASTIC+=(--nnodes="$NNODES" --node-rank="$NODE_RANK" --master-addr="${SETTING[master_addr]}"
      --master-port="${SETTING[master_port]:-29500}" --rdzv-conf="timeout=$group_timeout")
  else
    ELASTIC+=(--standalone --local-addr=127.0.0.1) # the kernel chooses the port
  fi
  ELASTIC+=(--no-python "$PYTHON" "$ROOT/bert_glue/launch/ranks.py" rank "$SCRATCH" "$OUTPUT")
  local cores
  cores=$(nproc 2>/dev/null || echo "$NPROC")
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}
  # After a signal, ranks may take this many seconds to save their checkpoint (torch's default of 30 is too short).
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-1800}
}

launcher_log() { # output of torch's launcher; one file per host, because all hosts may share the folder
  printf '%s' "$OUTPUT/launcher_$NODE_RANK.log"
}

start_ranks() { # start_ranks <command>...
  rm -f -- "$(launcher_log)" # it may be a link, and what it points to is not ours
  # torch's launcher keeps the two pipes open until it ends; the first rank opens them by name.
  exec 3>&1 4>&2 "${ELASTIC[@]}" "$@" >"$(launcher_log)" 2>&1
}

judge_ranks() { # judge_ranks <status of torch's launcher>: names the rank that failed first; returns the launcher's status
  "$PYTHON" "$ROOT/bert_glue/launch/ranks.py" verdict "$SCRATCH" "$OUTPUT" \
    --launcher_log "$(launcher_log)" --status "$1" --signal "$SIGNALLED"
}
