//! What each verb does: options from the command line to the facade, outcomes to exit codes.

use crate::args::{
    Args, AtLimit, Copy, Inspect, Keep, Keeping, Matching, PostCopy, Receive, Resume, Send, Transfer, Verb,
};
use crate::show::{Show, draw, finish, print_json, size, warn};
use crate::{demo, exit, live, resolve, signals, status, store};
use anyhow::{Context, Result, bail};
use pagewire::store::{Store, StoreError, StoreOptions};
use pagewire::{
    CancellationToken, CopyOptions, Inspection, Into, KeepWhat, LandingOptions, Outcome, ReceiveOptions, Reuse,
    SendOptions, Server, ServerEvent,
};
use serde_json::json;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

/// Does what the command line says.
pub(crate) fn run(args: Args) -> Result<ExitCode> {
    match args.verb {
        Verb::Demo(args) => demo::run(&args),
        Verb::Copy(args) => copy(&args),
        Verb::Receive(args) => receive(args),
        Verb::Send(args) => send(&args),
        Verb::Inspect(args) => inspect(&args),
        Verb::Store(args) => store::run(&args.verb),
        Verb::Status(args) => status::run(&args),
        Verb::Resolve(args) => resolve::run(&args),
        Verb::Resume(args) => resume(&args),
    }
}

fn cancellation() -> Result<CancellationToken> {
    let token = CancellationToken::new();
    signals::cancel_on_signal(token.clone()).context("signals cannot be watched")?;
    Ok(token)
}

fn send_options(transfer: &Transfer) -> Result<SendOptions> {
    Ok(SendOptions {
        install_size: transfer.page_size.into(),
        fresh: transfer.fresh,
        dedup: !transfer.no_dedup,
        compress: !transfer.no_compress,
        bandwidth_limit: transfer.bandwidth_limit,
        deadline: transfer.deadline,
        cancel: cancellation()?,
        ..SendOptions::default()
    })
}

fn end(outcome: &Outcome) -> ExitCode {
    outcome.error.as_ref().map_or(ExitCode::SUCCESS, exit::explain_transfer)
}

fn copy(args: &Copy) -> Result<ExitCode> {
    for path in [&args.source, &args.destination] {
        if is_remote(path) {
            eprintln!(
                "pagewire: {}: copying over ssh is not there yet; use `pagewire receive` there and `pagewire send` here \
                 (a local file with a colon in its name can be written as ./NAME)",
                path.display()
            );
            return Ok(ExitCode::from(2));
        }
    }
    let options = CopyOptions { send: send_options(&args.transfer)?, inplace: args.inplace };
    let mut show = Show::new(args.output.json);
    let outcome = pagewire::copy(&args.source, &args.destination, &options, &mut show);
    let seen = show.end();
    finish(&outcome, &args.output, seen);
    Ok(end(&outcome))
}

/// `host:path`, as rsync and scp take it: a colon before any slash.
fn is_remote(path: &Path) -> bool {
    let text = path.to_string_lossy();
    text.split_once(':').is_some_and(|(host, _)| !host.is_empty() && !host.contains('/'))
}

/// Brings what a guest lacks that runs at the receiver.
fn resume(args: &Resume) -> Result<ExitCode> {
    // The guest waits for its pages, which need no store.
    let (reuse, unused) = match reuse(&args.keeping, None, false) {
        Ok(reuse) => (reuse, None),
        Err(error) => (None, Some(format!("the store is not used: {}", pagewire::chain(&error)))),
    };
    let options = SendOptions {
        lanes: args.lanes,
        install_size: args.page_size.into(),
        compress: !args.no_compress,
        bandwidth_limit: args.bandwidth_limit,
        insecure_plaintext: args.insecure_plaintext,
        reuse,
        cancel: cancellation()?,
        ..SendOptions::default()
    };
    let journal = live::journal(args.journal.as_deref())?;
    let mut show = Show::new(args.output.json);
    let mut outcome =
        pagewire::resume(&args.source, &args.name, &args.to, (&journal, args.patience), &options, &mut show);
    outcome.report.warnings.extend(unused);
    let seen = show.end();
    finish(&outcome, &args.output, seen);
    Ok(end(&outcome))
}

fn send(args: &Send) -> Result<ExitCode> {
    if let (Some(PostCopy::Never), AtLimit::PostCopy) = (args.live.post_copy, args.live.at_limit) {
        eprintln!("pagewire: --post-copy never and --at-limit post-copy exclude each other");
        return Ok(ExitCode::from(2));
    }
    let reuse = match reuse(&args.keeping, Some(&args.matching), false) {
        Ok(reuse) => reuse,
        Err(error) => return store::refused(error),
    };
    let options = SendOptions {
        lanes: args.lanes,
        insecure_plaintext: args.insecure_plaintext,
        reuse,
        ..send_options(&args.transfer)?
    };
    let mut show = Show::new(args.output.json);
    let outcome = if args.live.live {
        let (live, hooks) = match live::live(&args.live, &args.name) {
            Ok(live) => live,
            Err(error) => return Ok(exit::explain_untouched(&error)),
        };
        pagewire::send_live(&args.source, &args.name, &args.to, &options, (&live, hooks), &mut show)
    } else {
        pagewire::send(&args.source, &args.name, &args.to, &options, &mut show)
    };
    let seen = show.end();
    draw(&outcome.report, args.live.plot.as_deref());
    finish(&outcome, &args.output, seen);
    Ok(end(&outcome))
}

/// The store that a command names.
fn reuse(keeping: &Keeping, matching: Option<&Matching>, trust: bool) -> Result<Option<Reuse>, StoreError> {
    let Some(dir) = &keeping.store else { return Ok(None) };
    let store = Store::open(dir, StoreOptions { budget: keeping.store_budget, existing: false })?;
    let keep = keeping.keep.map(|keep| match keep {
        Keep::None => KeepWhat::Nothing,
        Keep::Manifest => KeepWhat::Manifest,
        Keep::Visit => KeepWhat::Visit,
    });
    let domain = matching.and_then(|matching| matching.domain.clone());
    Ok(Some(Reuse { keep, trust, domain, ..Reuse::new(store) }))
}

fn receive(args: Receive) -> Result<ExitCode> {
    let into = match (args.into, args.into_file, args.into_uffd) {
        (_, Some(file), _) => Into::File(file),
        (_, _, Some(dir)) => Into::HandedOver(dir),
        (Some(dir), None, None) => Into::Folder(dir),
        (None, None, None) => bail!("--into, --into-file or --into-uffd is needed"),
    };
    if let Into::Folder(dir) | Into::HandedOver(dir) = &into
        && !dir.is_dir()
    {
        eprintln!("pagewire: {}: is not a folder", dir.display());
        return Ok(ExitCode::from(2));
    }
    if matches!(into, Into::HandedOver(_)) && args.take.on_start.is_none() && !args.take.leave_paused {
        eprintln!("pagewire: --into-uffd is for guests that run: say --on-start CMD, or --leave-paused");
        return Ok(ExitCode::from(2));
    }
    let live = match &into {
        Into::Folder(dir) => live::take(&args.take, live::Images::Folder(dir.clone()))?,
        Into::File(file) => live::take(&args.take, live::Images::File(file.clone()))?,
        Into::HandedOver(dir) => live::take(&args.take, live::Images::Sockets(dir.clone()))?,
        Into::Memory | Into::PostCopy { .. } | Into::PostCopyFolder { .. } => None,
    };
    let reuse = match reuse(&args.keeping, Some(&args.matching), args.trust_store) {
        Ok(reuse) => reuse,
        Err(error) => return store::refused(error),
    };
    let options = ReceiveOptions {
        reuse,
        live,
        landing: LandingOptions { inplace: args.inplace, fresh: args.fresh },
        lanes: args.lanes,
        sessions_max: usize::from(args.max_sessions),
        image_bytes_max: args.max_image,
        insecure_plaintext: args.insecure_plaintext,
        once: args.once,
        cancel: cancellation()?,
        ..ReceiveOptions::new(into)
    };
    let server = match Server::bind(&args.listen, options) {
        Ok(server) => server,
        Err(error) => return Ok(exit::explain_transfer(&error)),
    };
    eprintln!("listening on {}", server.address()?);
    let code = Arc::new(Mutex::new(ExitCode::SUCCESS));
    let (last, once, output) = (Arc::clone(&code), args.once, args.output);
    server.serve(move |event| {
        let ended = tell(&event, &output);
        if let (Some(code), true) = (ended, once) {
            *last.lock().unwrap_or_else(PoisonError::into_inner) = code;
        }
    });
    let code = *code.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(code)
}

/// Shows what a server tells; returns the code of a session that ended.
fn tell(event: &ServerEvent<'_>, output: &crate::args::Output) -> Option<ExitCode> {
    match event {
        ServerEvent::Connected { session, peer } if output.json => {
            print_json(&json!({"event": "connected", "session": session, "peer": peer}));
        }
        ServerEvent::Progress { session, event } if output.json => {
            print_json(&json!({"session": session, "progress": event}));
        }
        ServerEvent::Ended { session, outcome } => {
            finish(outcome, output, false);
            if let Some(error) = &outcome.error {
                let name = &outcome.report.name;
                let image = if name.is_empty() { "" } else { ", image " };
                warn(&format!("session {session}{image}{name}: {}", pagewire::chain(error)));
            }
            return Some(outcome.error.as_ref().map_or(ExitCode::SUCCESS, exit::code));
        }
        ServerEvent::HandedOver { session, name, .. } if output.json => {
            print_json(&json!({"event": "handed_over", "session": session, "name": name}));
        }
        ServerEvent::Stranger { peer, why } => warn(&format!("{peer}: {why}")),
        ServerEvent::Connected { .. }
        | ServerEvent::Progress { .. }
        | ServerEvent::Arrived { .. }
        | ServerEvent::HandedOver { .. } => {}
    }
    None
}

fn inspect(args: &Inspect) -> Result<ExitCode> {
    match pagewire::inspect(&args.image, args.against.as_deref()) {
        Ok(seen) if args.json => print_json(&seen),
        Ok(seen) => print!("{}", inspection(&seen, args.against.is_some())),
        Err(error) => {
            eprintln!("pagewire: {}", pagewire::chain(&error));
            return Ok(exit::code(&error));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn inspection(seen: &Inspection, against: bool) -> String {
    let share = |pages: u64| format!("{pages:>10}  {:>5.1} %", 100.0 * pages as f64 / seen.pages_total.max(1) as f64);
    let mut text = format!("{} in {} pages of 4 KiB\n", size(seen.bytes_total), seen.pages_total);
    let mut rows =
        vec![("zero", seen.zero), ("duplicate of an earlier page", seen.duplicate), ("distinct", seen.distinct)];
    if against {
        rows.insert(1, ("unchanged at its place", seen.unchanged));
        rows.insert(2, ("found elsewhere there", seen.elsewhere));
    }
    for (name, pages) in rows {
        text += &format!("  {name:<30}{}\n", share(pages));
    }
    text + &format!(
        "a transfer would carry {} raw, about {} compressed\n",
        size(seen.raw_bytes),
        size(seen.compressed_bytes)
    )
}
