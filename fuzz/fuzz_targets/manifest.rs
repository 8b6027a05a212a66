//! libFuzzer's entry to `pagewire_test_support::fuzz::manifest`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pagewire_test_support::fuzz::manifest(data));
