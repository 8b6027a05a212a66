//! The golden manifest, and every rule of `docs/STORE.md` for its header.

use super::*;
use crate::{Store, StoreOptions};
use pagewire_protocol::digest::{PageHasher, page_digest};
use pagewire_protocol::tree::{DigestTree, image_root};
use std::fmt::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};

/// Two regions: three pages, the second of zeros, and one short page.
fn golden() -> (Manifest, Vec<u8>) {
    let region = |bytes, install_size| Region { bytes, install_size };
    let layout = Layout::new(vec![region(3 << 12, InstallSize::KIB_4), region(100, InstallSize::MIB_2)]).unwrap();
    let key: [u8; 32] = std::array::from_fn(|at| at as u8);
    let hasher = PageHasher::new(&DedupDomain::new(&key));
    let mut trees = vec![DigestTree::new(&hasher, 3), DigestTree::new(&hasher, 1)];
    let mut short = [0; 4096];
    short[..100].fill(3);
    trees[0].set(0, page_digest(hasher.domain(), &[1; 4096]));
    trees[0].set(2, page_digest(hasher.domain(), &[2; 4096]));
    trees[1].set(0, page_digest(hasher.domain(), &short));
    let mut manifest = Manifest {
        id: VisitId([0xa1; 16]),
        key,
        lineage: LineageId([0xb2; 16]),
        name: ImageName::new("vm-1.img").unwrap(),
        session: [0xc3; 16],
        created: 1_700_000_000,
        sequence: 7,
        kind: VisitKind::Arrived,
        root: image_root(hasher.domain(), &layout, &mut trees),
        layout,
        present: Digest::default(),
    };
    // The third page was not worth keeping.
    let present = [0b1011];
    manifest.present = manifest.seal_present(&present);
    let mut bytes = manifest.encode().to_vec();
    bytes.extend(present);
    bytes.resize(2 * BLOCK, 0);
    let mut room = [[0; 32]; 256];
    let mut digests = |tree: usize, count: usize| trees[tree].leaves(0, &mut room).unwrap()[..count].to_vec();
    for digest in [digests(0, 3), digests(1, 1)].concat() {
        bytes.extend(digest);
    }
    (manifest, bytes)
}

/// Offsets and bytes, runs of zeros left out; then what they say.
fn text(manifest: &Manifest, bytes: &[u8]) -> String {
    let mut text = String::new();
    for (at, line) in bytes.chunks(32).enumerate().filter(|(_, line)| line.iter().any(|&byte| byte != 0)) {
        let hex: String = line.iter().map(|byte| format!("{byte:02x}")).collect();
        writeln!(text, "{:04x}: {hex}", at * 32).unwrap();
    }
    writeln!(text, "{:04x}: end\n", bytes.len()).unwrap();
    let key: String = manifest.key.iter().map(|byte| format!("{byte:02x}")).collect();
    writeln!(text, "domain {}\nkey {key}", manifest.domain().id()).unwrap();
    writeln!(text, "{manifest:#?}\nlineage {:02x?}\nsession {:02x?}", manifest.lineage.0, manifest.session).unwrap();
    let Manifest { created, sequence, kind, layout, root, present, .. } = manifest;
    writeln!(text, "created {created}\nsequence {sequence}\nkind {kind:?}\nroot {root}\npresent {present}").unwrap();
    layout.regions().iter().for_each(|region| writeln!(text, "{region:?}").unwrap());
    text
}

#[test]
fn the_golden_manifest_is_what_is_written() {
    let (manifest, bytes) = golden();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/vectors/manifest.txt");
    if std::env::var_os("PAGEWIRE_BLESS").is_some() {
        std::fs::write(path, text(&manifest, &bytes)).unwrap();
    }
    assert_eq!(std::fs::read_to_string(path).unwrap().replace("\r\n", "\n"), text(&manifest, &bytes));
    let block: &[u8; BLOCK] = bytes.first_chunk().unwrap();
    assert_eq!(Manifest::decode(block, bytes.len() as u64).as_ref(), Ok(&manifest));
}

#[test]
fn a_store_opens_the_golden_manifest() {
    let (manifest, bytes) = golden();
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("store/domains").join(manifest.domain().id().to_string());
    std::fs::DirBuilder::new().mode(0o700).recursive(true).create(&folder).unwrap();
    let file = folder.join(format!("{}.manifest", manifest.id));
    let mut file = std::fs::File::options().write(true).create_new(true).mode(0o600).open(file).unwrap();
    std::io::Write::write_all(&mut file, &bytes).unwrap();
    let store = Store::open(&dir.path().join("store"), StoreOptions::default()).unwrap();
    let head = &store.visits(&manifest.key)[0];
    let visit = store.open_visit(head).unwrap().unwrap();
    assert!(visit.trees(&PageHasher::new(&manifest.domain())).is_ok());
    assert_eq!(visit.present().unwrap().runs(0..4).collect::<Vec<_>>(), [0..2, 3..4]);
}

/// A body of the right shape with one field changed, sealed as a writer would.
fn with(change: impl FnOnce(&mut Body)) -> Result<Manifest, ManifestError> {
    let (manifest, file) = golden();
    let spec = |region: &Region| RegionSpec { bytes: region.bytes, install_size: region.install_size.bytes() };
    let regions = manifest.layout.regions().iter().map(spec).collect();
    let Manifest { id, key, lineage, name, session, created, sequence, root, present, .. } = manifest;
    let name = name.as_str().to_owned();
    let mut body: Body = (id.0, key, lineage.0, name, session, created, sequence, 2, regions, root.0, present.0);
    change(&mut body);
    let mut encoded = Vec::new();
    encode_body(&body, &mut encoded);
    Manifest::decode(&seal(&body.1, &encoded), file.len() as u64)
}

#[test]
fn headers_outside_their_limits_are_refused() {
    assert!(with(|_| {}).is_ok());
    assert!(matches!(with(|body| body.7 = 0), Err(ManifestError::Header(DecodeError::Unknown { field: "kind", .. }))));
    assert!(with(|body| body.7 = 3).is_err());
    for name in ["", ".", "..", "../x", "a/b", "a\0b", "a\nb", "é", &"a".repeat(65)] {
        let refused = with(|body| body.3 = name.to_owned());
        assert!(matches!(refused, Err(ManifestError::Header(DecodeError::Name(_)))), "{name:?}");
    }
    assert!(with(|body| body.8.clear()).is_err());
    assert!(with(|body| body.8[0].install_size = 8192).is_err());
    assert!(with(|body| body.8[0].bytes = u64::MAX).is_err());
    assert!(with(|body| body.8 = vec![body.8[0]; 65]).is_err());
    let longer = with(|body| body.8[0].bytes += 4096);
    assert!(matches!(longer, Err(ManifestError::Length { found: 8320, expected: 8352 })));
}

#[test]
fn bytes_after_the_body_and_other_versions_are_refused() {
    let (manifest, bytes) = golden();
    let block: [u8; BLOCK] = *bytes.first_chunk().unwrap();
    let len = usize::from(block[12]) + 256 * usize::from(block[13]);
    let body = [&block[16..16 + len], &[0]].concat();
    let refused = Manifest::decode(&seal(&manifest.key, &body), bytes.len() as u64);
    assert_eq!(refused, Err(ManifestError::Header(DecodeError::Trailing(1))));
    let change = |at: usize, byte| {
        let mut block = block;
        block[at] = byte;
        Manifest::decode(&block, bytes.len() as u64)
    };
    assert_eq!(change(7, 1), Err(ManifestError::Magic));
    assert_eq!(change(8, 2), Err(ManifestError::Version(2)));
    assert!(matches!(change(14, 1), Err(ManifestError::Header(DecodeError::Limit { .. }))));
    assert_eq!(change(4095, 1), Err(ManifestError::Padding));
    assert_eq!(change(16 + len, !block[16 + len]), Err(ManifestError::Seal));
}

#[test]
fn the_largest_header_fits() {
    let (manifest, _) = golden();
    let regions = vec![Region { bytes: 4096, install_size: InstallSize::KIB_64 }; 64];
    let name = ImageName::new(&"n".repeat(64)).unwrap();
    let largest = Manifest { layout: Layout::new(regions).unwrap(), name, ..manifest };
    assert_eq!(Manifest::decode(&largest.encode(), largest.file_len()), Ok(largest));
}
