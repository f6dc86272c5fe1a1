#!/usr/bin/env bash
# Runs bert-glue with CANN's environment, as the launchers do outside a container.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=test/env_npu.sh
source "$ROOT/test/env_npu.sh"
npu_environment
exec bert-glue "$@"
