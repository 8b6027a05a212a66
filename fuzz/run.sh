#!/bin/sh
# Fuzzes one target on the stable toolchain: fuzz/run.sh TARGET SECONDS [libFuzzer options]
# With `merge` for SECONDS it minimises fuzz/corpus/TARGET in place of fuzzing. New inputs go to fuzz/found/TARGET.
set -eu
target=$1 seconds=$2
shift 2
cd "$(dirname "$0")"
export CARGO_TARGET_DIR="${FUZZ_TARGET_DIR:-$PWD/target}"
RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1" \
    cargo build --release --offline --bin "$target" --target x86_64-unknown-linux-gnu ${FUZZ_JOBS:+-j "$FUZZ_JOBS"}
fuzzer=$CARGO_TARGET_DIR/x86_64-unknown-linux-gnu/release/$target
mkdir -p "corpus/$target" "found/$target"
if [ "$seconds" = merge ]; then
    rm -rf "found/$target.merged"
    mkdir "found/$target.merged"
    "$fuzzer" -merge=1 "$@" "found/$target.merged" "corpus/$target" "found/$target"
    rm -rf "corpus/$target"
    mv "found/$target.merged" "corpus/$target"
    exit
fi
exec "$fuzzer" -max_total_time="$seconds" -rss_limit_mb=1024 -timeout=10 -artifact_prefix="found/$target-" "$@" \
    "found/$target" "corpus/$target"
