//! libFuzzer's entry to `pagewire_test_support::fuzz::framing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pagewire_test_support::fuzz::framing(data));
