#!/usr/bin/env bash
# Everything that must hold before a commit, in the order of what fails fastest; the tests come last, so that their
# summary is the last thing seen. `./check.sh long` goes on with what takes hours.
set -euo pipefail
cd "$(dirname "$0")"
target=${CARGO_TARGET_DIR:-$PWD/target}

step() { printf '\n== %s\n' "$*"; }
skip() { printf '\n== SKIPPED: %s\n' "$*"; }

check() {
    step "format"
    cargo fmt --all --check
    for alone in tests/no-os fuzz; do
        cargo fmt --check --manifest-path "$alone/Cargo.toml"
    done

    step "lints"
    cargo clippy --locked --workspace --all-targets -- -D warnings

    step "engines without their drivers: no runtime in them"
    for engine in pagewire-sender pagewire-receiver; do
        cargo clippy --package "$engine" --no-default-features -- -D warnings
        tree=$(cargo tree --package "$engine" --no-default-features --edges normal --prefix none)
        if grep '^tokio' <<<"$tree"; then
            echo "$engine without its driver depends on tokio" >&2
            exit 1
        fi
    done

    step "documentation"
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

    step "protocol without an operating system"
    cargo build --locked --manifest-path tests/no-os/Cargo.toml --target-dir "$target/no-os"

    if ! command -v c++ >/dev/null; then
        skip "fuzz targets: libFuzzer's runtime needs a C++ compiler"
    else
        step "fuzz targets compile"
        cargo check --manifest-path fuzz/Cargo.toml --target-dir "$target/fuzz"
    fi

    dependencies

    step "tests"
    cargo test --workspace
}

dependencies() {
    if ! command -v cargo-deny >/dev/null; then
        skip "licences, versions and sources of dependencies: cargo-deny is not installed"
        return
    fi
    step "licences, versions and sources of dependencies"
    cargo deny check licenses bans sources
    if cargo deny fetch db >/dev/null 2>&1; then
        cargo deny check advisories
    else
        skip "advisories: their database cannot be fetched; deny.toml has the known floors"
    fi
}

long() {
    step "long: property tests with many cases"
    PROPTEST_CASES=${PROPTEST_CASES:-100000} cargo test --release --workspace

    step "long: a guest whose page faults are served by a process that is killed"
    PAGEWIRE_KILLS=${PAGEWIRE_KILLS:-10000} cargo test --release --package pagewire-receiver --test handler_death -- --nocapture

    step "long: live sessions by seed"
    PAGEWIRE_SEEDS=${PAGEWIRE_SEEDS:-100000} cargo test --release --package pagewire-test-suite --test live_seeds -- --nocapture

    step "long: processes that are killed, or stand still for longer than a peer waits"
    PAGEWIRE_KILLS=${PAGEWIRE_KILLS:-1000} PAGEWIRE_STOPS=${PAGEWIRE_STOPS:-100} PAGEWIRE_STOP_SECONDS=17 \
        cargo test --release --package pagewire-cli --test live --test live_ends

    step "long: every state of the hand-over in wider bounds"
    cargo test --release --package pagewire-test-suite --test handover_model -- --ignored --nocapture
}

case "${1:-}" in
    "") check ;;
    # Not `check && long`: bash would go on behind a failed step.
    long) check; long ;;
    *) echo "usage: ./check.sh [long]" >&2; exit 2 ;;
esac
