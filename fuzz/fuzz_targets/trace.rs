//! libFuzzer's entry to `pagewire_test_support::fuzz::trace`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pagewire_test_support::fuzz::trace(data));
