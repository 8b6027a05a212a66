//! House rules that a machine can hold: sizes, names, who may import whom, nothing left undone.
//!
//! Limits are ratchets: an allowance names the one file that is over a limit, and has to be lowered when the file
//! shrinks. Sources are parsed, so a `use` in braces counts like one in full; what macros are given is not seen.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot read its inputs has failed")]

use pagewire_test_suite::{SourceFile, files, read};
use std::collections::{BTreeMap, BTreeSet};
use syn::visit::{self, Visit};

const FILE_LINES_MAX: usize = 600;
const FUNCTION_LINES_MAX: usize = 70;
const FRAME_FILE_LINES_MAX: usize = 150;
/// Frame files over their limit: PAGES is five ways to state a page in one.
const FRAME_FILE_ALLOWANCES: &[(&str, usize)] = &[("protocol/src/frame/pages.rs", 185)];
/// How far an allowance may lie above what it allows.
const SLACK: usize = 10;

fn rust_files() -> Vec<SourceFile> {
    files(".rs").unwrap()
}

fn parse(file: &SourceFile) -> syn::File {
    syn::parse_file(&file.text).unwrap_or_else(|error| panic!("{}: {error}", file.path))
}

fn none(what: &str, found: &[String]) {
    assert!(found.is_empty(), "{what}:\n  {}", found.join("\n  "));
}

// Sizes

#[test]
fn files_are_small_enough_to_see() {
    let mut over = Vec::new();
    for file in rust_files() {
        let lines = file.text.lines().count();
        let in_frames = file.path.strip_prefix("protocol/src/frame/");
        let is_frame = in_frames.is_some_and(|name| !["mod.rs", "tests.rs"].contains(&name));
        let allowance = FRAME_FILE_ALLOWANCES.iter().find(|(path, _)| *path == file.path).map(|(_, lines)| *lines);
        let limit = allowance.unwrap_or(if is_frame { FRAME_FILE_LINES_MAX } else { FILE_LINES_MAX });
        if lines > limit {
            over.push(format!("{}: {lines} lines > {limit}", file.path));
        }
        if allowance.is_some_and(|limit| lines + SLACK < limit) {
            over.push(format!("{}: {lines} lines, lower its allowance of {limit}", file.path));
        }
    }
    none("files over their limit", &over);
}

/// Collects functions with their length from `fn` to the closing brace.
#[derive(Default)]
struct Functions(Vec<(String, usize, usize)>);

impl Functions {
    fn add(&mut self, signature: &syn::Signature, block: &syn::Block) {
        let start = signature.fn_token.span.start().line;
        let end = block.brace_token.span.close().end().line;
        self.0.push((signature.ident.to_string(), start, end + 1 - start));
    }
}

impl<'ast> Visit<'ast> for Functions {
    fn visit_item_fn(&mut self, node: &'ast syn::ItemFn) {
        self.add(&node.sig, &node.block);
        visit::visit_item_fn(self, node);
    }

    fn visit_impl_item_fn(&mut self, node: &'ast syn::ImplItemFn) {
        self.add(&node.sig, &node.block);
        visit::visit_impl_item_fn(self, node);
    }

    fn visit_trait_item_fn(&mut self, node: &'ast syn::TraitItemFn) {
        if let Some(block) = &node.default {
            self.add(&node.sig, block);
        }
        visit::visit_trait_item_fn(self, node);
    }
}

#[test]
fn functions_are_small_enough_to_see() {
    let mut over = Vec::new();
    for file in rust_files() {
        let mut functions = Functions::default();
        functions.visit_file(&parse(&file));
        for (name, line, lines) in functions.0.iter().filter(|(_, _, lines)| *lines > FUNCTION_LINES_MAX) {
            over.push(format!("{}:{line}: {name} has {lines} lines > {FUNCTION_LINES_MAX}", file.path));
        }
    }
    none("functions over their limit", &over);
}

/// Only reported: a share says nothing about whether a comment is worth its line.
#[test]
fn reports_the_share_of_comments() {
    let mut crates: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for file in rust_files() {
        let folder = file.path.split("/src/").next().unwrap_or_default().to_owned();
        let (comments, lines) = crates.entry(folder).or_default();
        *comments += file.text.lines().filter(|line| line.trim_start().starts_with("//")).count();
        *lines += file.text.lines().filter(|line| !line.trim().is_empty()).count();
    }
    for (folder, (comments, lines)) in crates {
        println!("{folder}: {comments} of {lines} lines are comments ({} %)", comments * 100 / lines.max(1));
    }
}

// Names and leftovers

#[test]
fn no_room_is_called_util() {
    let named = |name: &str| ["util", "utils", "helpers", "misc", "common"].contains(&name);
    let found: Vec<String> = rust_files().into_iter().map(|file| file.path).collect();
    let found: Vec<String> = found.into_iter().filter(|path| path.split(['/', '.']).any(named)).collect();
    none("a room whose name says nothing", &found);
}

/// Collects macros that say that something is not finished.
#[derive(Default)]
struct Leftovers(Vec<(String, usize)>);

impl<'ast> Visit<'ast> for Leftovers {
    fn visit_macro(&mut self, node: &'ast syn::Macro) {
        if let Some(last) = node.path.segments.last() {
            let name = last.ident.to_string();
            if ["todo", "unimplemented", "dbg"].contains(&name.as_str()) {
                self.0.push((name, last.ident.span().start().line));
            }
        }
        visit::visit_macro(self, node);
    }
}

#[test]
fn nothing_is_left_undone() {
    let mut found = Vec::new();
    for file in rust_files() {
        let mut leftovers = Leftovers::default();
        leftovers.visit_file(&parse(&file));
        found.extend(leftovers.0.iter().map(|(name, line)| format!("{}:{line}: {name}!", file.path)));
    }
    none("not finished", &found);
}

/// The rooms of unsafe code, each the file that lifts the lint for itself and what lies below it.
const UNSAFE_ROOMS: &[&str] = &[
    "benches/faults.rs",
    "benches/postcopy/plain.rs",
    "cli/tests/support/database.rs",
    "hypervisors/kvm/src/raw.rs",
    "hypervisors/kvm/tests/real_mode.rs",
    "hypervisors/kvm/tests/vmm/mod.rs",
    "receiver/src/memory/mapping.rs",
    "receiver/src/memory/uffd/raw.rs",
    "sender/src/memory/raw/mod.rs",
    "store/src/mapped.rs",
    "tests/no-os/src/lib.rs",
];

/// Whether an attribute lifts the lint against unsafe code.
#[derive(Default)]
struct LiftsUnsafe(bool);

impl<'ast> Visit<'ast> for LiftsUnsafe {
    fn visit_attribute(&mut self, node: &'ast syn::Attribute) {
        let Ok(list) = node.meta.require_list() else { return };
        let lifts = ["allow", "expect", "warn"].iter().any(|level| list.path.is_ident(level));
        self.0 |= lifts && list.tokens.to_string().contains("unsafe_code");
    }
}

#[test]
fn unsafe_code_stays_in_its_rooms() {
    let lifting = rust_files().into_iter().filter(|file| {
        let mut lifts = LiftsUnsafe::default();
        lifts.visit_file(&parse(file));
        lifts.0
    });
    let lifting: BTreeSet<String> = lifting.map(|file| file.path).collect();
    assert_eq!(lifting, UNSAFE_ROOMS.iter().map(|&room| room.to_owned()).collect());
}

// Crates

/// A crate as its manifest shows it.
struct Crate {
    folder: String,
    name: String,
    manifest: String,
}

fn crates() -> Vec<Crate> {
    let manifests = files("Cargo.toml").unwrap().into_iter().filter(|file| file.path != "Cargo.toml");
    let read = |file: SourceFile| {
        let name = file.text.lines().find_map(|line| line.strip_prefix("name = \"")?.strip_suffix('"'));
        Crate {
            folder: file.path.trim_end_matches("/Cargo.toml").to_owned(),
            name: name.unwrap_or_default().to_owned(),
            manifest: file.text,
        }
    };
    manifests.map(read).collect()
}

/// The strings of the list `key = ["…", "…"]` in a manifest.
fn list(manifest: &str, key: &str) -> BTreeSet<String> {
    let (_, rest) = manifest.split_once(&format!("\n{key} = [")).unwrap();
    let (inside, _) = rest.split_once(']').unwrap();
    inside.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn crates_are_the_folders_and_are_called_so() {
    let root = read("Cargo.toml").unwrap();
    let mut listed = list(&root, "members");
    listed.extend(list(&root, "exclude").into_iter().filter(|folder| read(&format!("{folder}/Cargo.toml")).is_ok()));
    let folders: BTreeSet<String> = crates().into_iter().map(|krate| krate.folder).collect();
    assert_eq!(listed, folders, "members of the workspace, and folders with a manifest");
    let fits =
        |krate: &Crate| krate.name.starts_with("pagewire-") || (krate.name == "pagewire" && krate.folder == "pagewire");
    let odd =
        crates().into_iter().filter(|krate| !fits(krate)).map(|krate| format!("{}: {}", krate.folder, krate.name));
    none("packages that are not called pagewire-…", &odd.collect::<Vec<_>>());
}

/// One line of a dependency table.
struct Dependency {
    name: String,
    dev: bool,
    line: String,
}

fn dependencies(manifest: &str) -> Vec<Dependency> {
    let (mut section, mut found) = ("", Vec::new());
    for line in manifest.lines().map(str::trim) {
        if let Some(header) = line.strip_prefix('[') {
            section = header.trim_end_matches(']');
        } else if section.ends_with("dependencies") && !line.starts_with('#') {
            let Some((key, _)) = line.split_once('=') else { continue };
            let name = key.trim().trim_end_matches(".workspace").to_owned();
            found.push(Dependency { name, dev: section.ends_with("dev-dependencies"), line: line.to_owned() });
        }
    }
    found
}

const SOCKETS: &[&str] =
    &["tokio", "tokio-util", "tokio-rustls", "quinn", "rustls", "socket2", "mio", "pagewire-transport"];
const ROLES: &[&str] = &["pagewire-sender", "pagewire-receiver"];

const BELOW_HYPERVISORS: &[&str] = &["pagewire-protocol", "pagewire-store", "pagewire-sender", "pagewire-receiver"];

/// Whether `folder` may depend on `name`, outside of its own tests: docs/ARCHITECTURE.md, section 2.
fn may_depend(folder: &str, name: &str) -> bool {
    let above = ["pagewire", "pagewire-cli", "pagewire-test-support", "pagewire-test-suite"].contains(&name);
    let by_folder = match folder {
        "protocol" => ["bytes", "blake3", "bincode", "thiserror", "zstd"].contains(&name),
        "store" => !above && !SOCKETS.contains(&name) && !ROLES.contains(&name),
        "transport" => !above && !ROLES.contains(&name) && name != "pagewire-store",
        "sender" => !above && name != "pagewire-receiver",
        "receiver" => !above && name != "pagewire-sender",
        "tests/support" | "fuzz" => !SOCKETS.contains(&name),
        "tests/no-os" => name == "pagewire-protocol",
        _ if folder.starts_with("hypervisors/") => !name.starts_with("pagewire") || BELOW_HYPERVISORS.contains(&name),
        _ => name != "pagewire-cli",
    };
    // One place hashes and encodes (benches measure against it); errors without a type are for the program.
    let one_place = match name {
        "blake3" => ["protocol", "benches"].contains(&folder),
        "bincode" => folder == "protocol",
        "anyhow" => folder == "cli",
        "linux-raw-sys" => ROLES.contains(&format!("pagewire-{folder}").as_str()),
        "kvm-ioctls" | "kvm-bindings" => folder.starts_with("hypervisors/"),
        _ => true,
    };
    by_folder && one_place
}

#[test]
fn crates_depend_on_what_they_may() {
    let mut wrong = Vec::new();
    for krate in crates() {
        for Dependency { name, dev, line } in dependencies(&krate.manifest) {
            if !dev && !may_depend(&krate.folder, &name) {
                wrong.push(format!("{} depends on {name}", krate.folder));
            }
            let engine = ["sender", "receiver"].contains(&krate.folder.as_str());
            if !dev && engine && SOCKETS.contains(&name.as_str()) && !line.contains("optional = true") {
                wrong.push(format!("{} depends on {name} without the driver feature", krate.folder));
            }
            let without_driver = ["tests/support", "fuzz"].contains(&krate.folder.as_str());
            if without_driver && ROLES.contains(&name.as_str()) && line.contains("\"driver\"") {
                wrong.push(format!("{} uses the driver of {name}", krate.folder));
            }
        }
    }
    none("dependencies against docs/ARCHITECTURE.md, section 2", &wrong);
}

// Imports

fn is_test_only(attributes: &[syn::Attribute]) -> bool {
    let is_test = |list: &syn::MetaList| list.path.is_ident("cfg") && list.tokens.to_string() == "test";
    attributes.iter().any(|attribute| attribute.meta.require_list().is_ok_and(is_test))
}

/// Collects the paths that production code names, written out in full.
#[derive(Default)]
struct Paths(Vec<(String, usize)>);

impl Paths {
    fn tree(&mut self, before: &str, tree: &syn::UseTree) {
        let joined =
            |ident: &syn::Ident| if before.is_empty() { ident.to_string() } else { format!("{before}::{ident}") };
        match tree {
            syn::UseTree::Path(path) => self.tree(&joined(&path.ident), &path.tree),
            syn::UseTree::Name(name) => self.0.push((joined(&name.ident), name.ident.span().start().line)),
            syn::UseTree::Rename(rename) => self.0.push((joined(&rename.ident), rename.ident.span().start().line)),
            syn::UseTree::Glob(glob) => self.0.push((before.to_owned(), glob.star_token.spans[0].start().line)),
            syn::UseTree::Group(group) => group.items.iter().for_each(|item| self.tree(before, item)),
        }
    }
}

impl<'ast> Visit<'ast> for Paths {
    fn visit_item_mod(&mut self, node: &'ast syn::ItemMod) {
        if !is_test_only(&node.attrs) {
            visit::visit_item_mod(self, node);
        }
    }

    fn visit_item_fn(&mut self, node: &'ast syn::ItemFn) {
        if !is_test_only(&node.attrs) {
            visit::visit_item_fn(self, node);
        }
    }

    fn visit_item_use(&mut self, node: &'ast syn::ItemUse) {
        if !is_test_only(&node.attrs) {
            self.tree("", &node.tree);
        }
    }

    fn visit_path(&mut self, node: &'ast syn::Path) {
        let segments: Vec<String> = node.segments.iter().map(|segment| segment.ident.to_string()).collect();
        let line = node.segments.first().map_or(0, |segment| segment.ident.span().start().line);
        self.0.push((segments.join("::"), line));
        visit::visit_path(self, node);
    }
}

const CLOCKS: &[&str] = &["std::time::Instant", "std::time::SystemTime", "Instant::now", "SystemTime::now"];
const SENSES: &[&str] =
    &["std::net", "std::fs", "std::thread", "std::process", "std::env", "rustix", "libc", "memmap2"];
const NETWORK: &[&str] = &["tokio", "tokio_util", "pagewire_transport", "std::net", "socket2"];

/// What a source file must not name.
fn forbidden(path: &str) -> Vec<&'static str> {
    let Some((folder, inside)) = path.split_once("/src/") else { return Vec::new() };
    let driver = inside.starts_with("driver");
    let memory = inside.starts_with("memory");
    let lists: &[&[&'static str]] = match folder {
        "protocol" if inside == "digest.rs" => &[CLOCKS, SENSES, NETWORK, &["std::time", "bincode"]],
        "protocol" => &[CLOCKS, SENSES, NETWORK, &["std::time", "blake3::platform"]],
        "store" => &[NETWORK, &["std::thread", "Instant::now"]],
        "sender" | "receiver" if driver => &[],
        "sender" | "receiver" if memory => &[CLOCKS, NETWORK, &["std::thread"]],
        "sender" | "receiver" => &[CLOCKS, SENSES, NETWORK],
        "tests/support" => &[CLOCKS, NETWORK, &["std::thread"]],
        _ => &[],
    };
    lists.concat()
}

#[test]
fn sources_name_what_they_may() {
    let mut wrong = Vec::new();
    for file in rust_files().into_iter().filter(|file| !file.path.ends_with("tests.rs")) {
        let forbidden = forbidden(&file.path);
        let mut paths = Paths::default();
        paths.visit_file(&parse(&file));
        for (path, line) in paths.0 {
            let names = |word: &&&str| {
                path == **word || path.starts_with(&format!("{word}::")) || path.ends_with(&format!("::{word}"))
            };
            if let Some(word) = forbidden.iter().find(names) {
                wrong.push(format!("{}:{line}: {path} ({word})", file.path));
            }
        }
    }
    none("imports against docs/ARCHITECTURE.md, section 2", &wrong);
}

/// The rules above would hold of a parser that sees nothing, too.
#[test]
fn the_parser_sees_what_it_must() {
    let text = "use std::{fs as f, io};\nfn a() {\n    let t = std::time::Instant::now();\n    todo!()\n}\n#[cfg(test)]\nmod tests { use tokio::net; }\n";
    let file = syn::parse_file(text).unwrap();
    let mut paths = Paths::default();
    paths.visit_file(&file);
    let paths: Vec<&str> = paths.0.iter().map(|(path, _)| path.as_str()).collect();
    assert!(paths.contains(&"std::fs") && paths.contains(&"std::time::Instant::now") && !paths.contains(&"tokio::net"));
    let mut functions = Functions::default();
    functions.visit_file(&file);
    assert_eq!(functions.0, [("a".to_owned(), 2, 4)]);
    let mut leftovers = Leftovers::default();
    leftovers.visit_file(&file);
    assert_eq!(leftovers.0, [("todo".to_owned(), 4)]);
    let manifest = "[dependencies]\na.workspace = true\n[dev-dependencies]\nb = { path = \"x\" }\n[features]\nc = []\n";
    let seen: Vec<_> = dependencies(manifest).into_iter().map(|it| (it.name, it.dev)).collect();
    assert_eq!(seen, [("a".to_owned(), false), ("b".to_owned(), true)]);
}
