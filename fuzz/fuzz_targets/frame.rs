//! libFuzzer's entry to `pagewire_test_support::fuzz::frame`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pagewire_test_support::fuzz::frame(data));
