//! SIGINT and SIGTERM cancel what runs, cleanly; a second one ends the process at once.

use pagewire::CancellationToken;
use tokio::signal::unix::{SignalKind, signal};

/// Cancels `token` on the first signal.
///
/// # Errors
/// Signals cannot be watched.
pub(crate) fn cancel_on_signal(token: CancellationToken) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    // Watched before this returns, so that no signal finds the process unprepared.
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::Builder::new().name("pagewire-signals".to_owned()).spawn(move || {
        runtime.block_on(async {
            for again in [false, true] {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if again {
                    std::process::exit(130);
                }
                token.cancel();
            }
        });
    })?;
    Ok(())
}
