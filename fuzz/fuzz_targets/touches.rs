//! libFuzzer's entry to `pagewire_test_support::fuzz::touches`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pagewire_test_support::fuzz::touches(data));
