//! The hand-over, walked through in all its states by a model checker: the rule holds, everything it promises can be
//! reached, and no clause of it can be left out. C16 to C26 of docs/THREATS.md, A24 for the hand-over.
//!
//! `cargo test -p pagewire-test-suite --test handover_model -- --nocapture` prints the states; with `--ignored` it walks
//! further, which takes long.
#![expect(clippy::unwrap_used, reason = "a world that cannot be built has failed")]

mod ends;
mod fill;
mod mutants;
mod world;

use mutants::Mutant;
use pagewire_protocol::handover::{Handovers, Input, Output, ReceiverPhase, RecordKind, SenderPhase};
use stateright::{Checker, HasDiscoveries, Model, Property};
use world::{Action, CALM, Config, State, World};

impl Model for World {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![self.first()]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        // What has gone wrong once is enough.
        if state.wrong.is_none() {
            self.actions_of(state, actions);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        self.act(&mut state, action);
        (state != *last).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = always();
        if self.mutant.is_none() {
            properties.extend(sometimes(&self.config));
        }
        properties
    }
}

fn always() -> Vec<Property<World>> {
    vec![
        // I1, I2, I4: one runner, which never has an older copy, and a last copy that is kept.
        Property::always("nothing has gone wrong", |_, state: &State| state.wrong.is_none()),
        // I8: from here on without faults, it ends in a state that has a name.
        Property::always("ends", |world: &World, state: &State| ends::end(world, state).is_ok()),
        Property::always("cancel works before HANDED and is refused after it", |world: &World, state: &State| {
            (0..2).all(|at| cancel_is_right(world, state, at))
        }),
        Property::always("a guest in doubt has not run since", |_, state: &State| {
            (0..2).all(|at| match state.hosts[at].outgoing() {
                Some((SenderPhase::Handed, handover)) => {
                    state.last_runner != at || handover.root.0[0] == state.guest || state.vouched
                }
                _ => true,
            })
        }),
        Property::always("memory that is served stays, and stands still", |world: &World, state: &State| {
            state.hosts.iter().all(|host| fill::is_kept(world, host))
        }),
        Property::always("what a guest lacks its sender has", |world: &World, state: &State| {
            (0..2).all(|at| fill::is_backed(world, state, at))
        }),
        Property::always("no guest with absent pages is sent on", |_, state: &State| {
            state.hosts.iter().all(|host| host.lacks == 0 || !may_open(host.desk.as_ref()))
        }),
        // C25
        Property::always("no second session while a hand-over is open", |_, state: &State| {
            state.hosts.iter().all(|host| host.outgoing().is_none() || !may_open(host.desk.as_ref()))
        }),
    ]
}

fn may_open(desk: Option<&Handovers>) -> bool {
    desk.is_some_and(|desk| desk.clone().open([99; 16]).is_ok())
}

// I9
fn cancel_is_right(world: &World, state: &State, at: usize) -> bool {
    let host = &state.hosts[at];
    let (Some((phase, handover)), Some(desk)) = (host.outgoing(), &host.desk) else { return true };
    let handed = host
        .disk
        .iter()
        .chain(&host.writing)
        .any(|record| record.handover == handover && matches!(record.kind, RecordKind::Handed | RecordKind::Gone));
    let mut cancelled = desk.clone();
    let outputs = world.step(&mut cancelled, Input::Cancel);
    match phase {
        SenderPhase::Returning { .. } => true,
        _ if handed => cancelled == *desk && matches!(outputs.as_slice(), [Output::Refuse(_)]),
        _ => outputs.contains(&Output::Resume(handover)),
    }
}

/// The guest has changed hosts, and both know it.
fn is_done(state: &State) -> bool {
    let [sender, receiver] = &state.hosts;
    let gone = |host: &world::Host| host.disk.iter().any(|record| record.kind == RecordKind::Gone);
    receiver.runs && gone(sender) && gone(receiver)
}

/// The guest runs at the sender again after a hand-over began.
fn is_back(state: &State, rejected: bool) -> bool {
    let [sender, receiver] = &state.hosts;
    let returned = sender.disk.iter().any(|record| {
        let of_this = record.kind == RecordKind::Returned && record.handover.epoch.number() > 4;
        of_this && receiver.wrote(RecordKind::Rejected, &record.handover) == rejected
    });
    sender.runs && returned
}

type Condition = fn(&World, &State) -> bool;

/// What can be reached, if the walk has what it takes.
fn sometimes(config: &Config) -> Vec<Property<World>> {
    let mut all: Vec<(&'static str, bool, Condition)> = vec![
        ("it succeeds", true, |_, state| is_done(state)),
        ("it is cancelled", true, |_, state| is_back(state, false)),
        ("in doubt", true, |_, state| state.told_doubt && !state.hosts[1].runs),
        ("doubt ends with a new connection", true, |_, state| state.told_doubt && is_done(state)),
        ("it is rejected, and the guest runs on", true, |_, state| is_back(state, true)),
        ("two hand-overs, there and back", config.offers > 1 && config.kept, |_, state| {
            let back = state.hosts[0].incoming().is_some_and(|(phase, _)| phase == ReceiverPhase::Settled);
            state.hosts[0].runs && back
        }),
        ("a lost guest is known to be lost", (!config.kept || config.post_copy) && config.crashes > 0, |_, state| {
            state.hosts[1].incoming().is_some_and(|(phase, _)| phase == ReceiverPhase::Lost)
        }),
        ("a write that failed, and success", config.fails > 0, |_, state| {
            state.hosts.iter().any(|host| host.fails > 0) && is_done(state)
        }),
    ];
    all.push(("all crashes, and success", config.kept && !config.operator, |world, state| {
        state.hosts.iter().all(|host| host.crashes == world.config.crashes) && is_done(state)
    }));
    let cut = config.post_copy && config.kept && config.crashes > 0;
    all.push(("it runs with pages absent", config.post_copy, |_, state| {
        state.hosts[1].runs && state.hosts[1].lacks > 0
    }));
    all.push(("what is absent comes after a cut", cut, |_, state| state.cut && is_done(state)));
    all.push(("what is served outlives a receiver that crashed", cut, |_, state| {
        let serves = state.hosts[0].outgoing().is_some_and(|(phase, _)| phase == SenderPhase::Serving);
        serves && state.hosts[1].incoming().is_some_and(|(phase, _)| phase == ReceiverPhase::Lost)
    }));
    all.push(("an operator takes it back", config.operator, |_, state| state.hosts[1].fenced && state.hosts[0].runs));
    all.push(("an operator starts it", config.operator, |_, state| state.hosts[0].fenced && state.hosts[1].runs));
    all.push(("the arbiter gives it back", config.arbiter, |_, state| {
        state.granted.values().any(|host| *host == world::IDS[0]) && is_back(state, true)
    }));
    all.push(("the arbiter gives it away", config.arbiter, |_, state| {
        state.granted.values().any(|host| *host == world::IDS[1]) && is_done(state)
    }));
    let reachable = all.into_iter().filter(|(_, possible, _)| *possible);
    reachable.map(|(name, _, condition)| Property::sometimes(name, condition)).collect()
}

/// The walks: each has faults of its own, as all of them at once are too many states.
const WALKS: &[Config] = &[
    Config { name: "file, two crashes each", crashes: 2, ..CALM },
    Config { name: "memory, two crashes each", kept: false, crashes: 2, ..CALM },
    Config { name: "file, failing writes", fails: 1, ..CALM },
    Config { name: "file, arbiter", arbiter: true, ..CALM },
    Config { name: "file, operator", operator: true, ..CALM },
    Config { name: "memory, operator", kept: false, operator: true, ..CALM },
    Config { name: "file, two hand-overs", offers: 2, ..CALM },
    Config { name: "file, two hand-overs, arbiter, no crash", offers: 2, arbiter: true, crashes: 0, ..CALM },
    Config { name: "file, strays", strays: true, ..CALM },
];

/// With pages absent when the guest starts.
const POST_COPY: Config = Config { post_copy: true, ..CALM };

/// The walks of hand-overs with post-copy.
const SPLIT: &[Config] = &[
    Config { name: "post-copy, file, two crashes each", crashes: 2, ..POST_COPY },
    Config { name: "post-copy, memory, two crashes each", kept: false, crashes: 2, ..POST_COPY },
    Config { name: "post-copy, file, failing writes", fails: 1, ..POST_COPY },
    Config { name: "post-copy, file, arbiter", arbiter: true, ..POST_COPY },
    Config { name: "post-copy, file, operator, two crashes each", operator: true, crashes: 2, ..POST_COPY },
    Config { name: "post-copy, memory, operator", kept: false, operator: true, ..POST_COPY },
    Config { name: "post-copy, file, two hand-overs", offers: 2, ..POST_COPY },
    Config { name: "post-copy, file, strays, no crash", strays: true, crashes: 0, ..POST_COPY },
];

const HARSH: Config = Config { crashes: 2, fails: 1, ..CALM };

/// Wider ones, for the rule itself.
const WIDER: &[Config] = &[
    Config { name: "file, two crashes and a failing write each", ..HARSH },
    Config { name: "memory, two crashes and a failing write each", kept: false, ..HARSH },
    Config { name: "file, two crashes and a failing write each, arbiter", arbiter: true, ..HARSH },
    Config { name: "memory, two crashes and a failing write each, arbiter", kept: false, arbiter: true, ..HARSH },
    Config { name: "file, two crashes and a failing write each, operator", operator: true, ..HARSH },
    Config { name: "memory, two crashes and a failing write each, operator", kept: false, operator: true, ..HARSH },
    Config { name: "file, two hand-overs, two crashes each", offers: 2, crashes: 2, ..CALM },
    Config { name: "file, two hand-overs, a failing write each", offers: 2, fails: 1, ..CALM },
    Config { name: "file, two hand-overs, operator", offers: 2, operator: true, ..CALM },
    Config { name: "memory, two hand-overs, operator", kept: false, offers: 2, operator: true, ..CALM },
];

const LONG: &[Config] = &[
    Config { name: "file, two crashes each, strays", crashes: 2, strays: true, ..CALM },
    Config { name: "file, two hand-overs, two crashes and a failing write each", offers: 2, ..HARSH },
    Config {
        name: "file, two hand-overs, two crashes and a failing write each, operator",
        offers: 2,
        operator: true,
        ..HARSH
    },
    Config {
        name: "memory, two hand-overs, two crashes and a failing write each, operator",
        kept: false,
        offers: 2,
        operator: true,
        ..HARSH
    },
    Config { name: "file, arbiter, operator", arbiter: true, operator: true, ..CALM },
    Config { name: "memory, arbiter, operator", kept: false, arbiter: true, operator: true, ..CALM },
    Config { name: "file, two hand-overs, arbiter", offers: 2, arbiter: true, ..CALM },
    Config { name: "file, three hand-overs", offers: 3, ..CALM },
    Config { name: "memory, three hand-overs, operator", kept: false, offers: 3, operator: true, ..CALM },
    Config { name: "file, three hand-overs, two crashes each", offers: 3, crashes: 2, ..CALM },
    Config { name: "file, two hand-overs, no crash, strays", offers: 2, crashes: 0, strays: true, ..CALM },
];

fn walk(config: Config) {
    let began = std::time::Instant::now();
    // Depth first, because its states wait in memory by the depth, and by the breadth there are gigabytes of them.
    let checker = World { config, mutant: None }.checker().threads(2).spawn_dfs().join();
    let states = checker.unique_state_count();
    println!("{}: {states} states, {:.1} s", config.name, began.elapsed().as_secs_f64());
    checker.assert_properties();
}

#[test]
fn the_rule_holds_in_every_state() {
    WALKS.iter().chain(WIDER).for_each(|config| walk(*config));
}

#[test]
fn the_rule_holds_in_every_state_with_pages_absent() {
    SPLIT.iter().for_each(|config| walk(*config));
}

#[test]
#[ignore = "long"]
fn the_rule_holds_in_every_state_of_long_walks() {
    LONG.iter().for_each(|config| walk(*config));
}

/// How a mutant was caught: in which walk, by which property, after how many steps.
fn caught(mutant: Mutant) -> Option<(&'static str, &'static str, usize)> {
    // What only hand-overs with post-copy can get wrong nothing else needs to be walked through for.
    let walks = if mutant.is_of_post_copy() { SPLIT } else { WALKS };
    walks.iter().find_map(|&config| {
        let checker = World { config, mutant: Some(mutant) }.checker();
        let checker = checker.finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
        let mut found: Vec<_> = checker.discoveries().into_iter().collect();
        found.sort_by_key(|(name, _)| always().iter().position(|property| property.name == *name));
        let (name, path) = found.into_iter().next()?;
        Some((config.name, name, path.into_actions().len()))
    })
}

#[test]
fn no_clause_can_be_left_out() {
    let mut missed = Vec::new();
    for &mutant in Mutant::ALL {
        match caught(mutant) {
            Some((walk, property, steps)) => println!("{mutant:?}: caught in {steps} steps ({walk}: {property})"),
            None => missed.push(mutant),
        }
    }
    assert!(Mutant::ALL.len() >= 50);
    assert_eq!(missed, [], "mutants that live");
}
