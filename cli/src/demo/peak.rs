//! The most memory that this process had.

/// Forgets the peak, where the kernel lets us. Without that it is the peak since the process began.
pub(super) fn forget() -> bool {
    std::fs::write("/proc/self/clear_refs", "5").is_ok()
}

/// `VmHWM`: the most resident memory since it was forgotten, in bytes. Guests' memory is in files and does not count.
pub(super) fn bytes() -> Option<u64> {
    kib(&std::fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

/// A figure in KiB of a file like `/proc/meminfo`, in bytes.
pub(super) fn kib(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    value.trim().strip_suffix("kB")?.trim_end().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_figures_as_the_kernel_writes_them() {
        assert_eq!(kib("MemTotal:  1 kB\nMemAvailable:   20463 kB\n", "MemAvailable:"), Some(20463 * 1024));
        assert_eq!(kib("MemTotal:  1 kB\n", "MemAvailable:"), None);
        assert_eq!(kib("VmHWM:  lots\n", "VmHWM:"), None);
    }
}
