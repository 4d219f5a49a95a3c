#!/usr/bin/env bash
# Converts a checkpoint, verifies the bytes and validates the build. The exit status is 3 when a
# limit is missed; whatever publishes the build runs after this script, and only on status 0.
#
#     examples/release_gate.sh CHECKPOINT OUTPUT [OPTION OF lfmq convert]...
#
# THRESHOLDS is a TOML file of limits; TOKENS and SEQUENCE say how much text, in windows of what length.
set -euo pipefail

checkpoint=$1 output=$2
shift 2
thresholds=${THRESHOLDS:-$(dirname "$0")/../docs/examples/thresholds.toml}
text=(--tokens "${TOKENS:-32768}" --sequence "${SEQUENCE:-512}")

lfmq convert "$checkpoint" --output "$output" --to gguf "${text[@]}" --quiet "$@"
lfmq verify "$output"/*.gguf
lfmq validate "$checkpoint" "$output"/*.gguf "${text[@]}" --quiet --thresholds "$thresholds" \
    --html "$output/report.html" --json >"$output/report.json"
