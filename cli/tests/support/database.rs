//! A database of SQLite in guest memory: made at the sender, read and changed where the guest runs. SQLite itself loads
//! and stores there, so each page that has not come stops it.
#![expect(unsafe_code, reason = "SQLite is C, and the database is where the guest's memory is")]

use libsqlite3_sys as sqlite;
use std::ffi::{CStr, CString, c_char, c_int};
use std::ptr;

/// Bytes that the database may grow to.
pub(crate) const BYTES: usize = 4 << 20;
const ROWS: i64 = 20_000;
const MAIN: *const c_char = c"main".as_ptr();

/// An open database.
struct Database(*mut sqlite::sqlite3);

impl Database {
    fn open() -> Self {
        let mut database = ptr::null_mut();
        // SAFETY: both strings end in a zero byte, and `database` takes what is opened.
        let result = unsafe { sqlite::sqlite3_open(c":memory:".as_ptr(), &raw mut database) };
        assert_eq!(result, sqlite::SQLITE_OK);
        Self(database)
    }

    fn check(&self, result: c_int) -> Result<(), String> {
        if [sqlite::SQLITE_OK, sqlite::SQLITE_ROW, sqlite::SQLITE_DONE].contains(&result) {
            return Ok(());
        }
        // SAFETY: the message is a string that lives until the next call.
        Err(unsafe { CStr::from_ptr(sqlite::sqlite3_errmsg(self.0)) }.to_string_lossy().into_owned())
    }

    /// Runs one statement; what its first row has, columns with a space between them.
    fn say(&self, statement: &str) -> Result<String, String> {
        let text = CString::new(statement).unwrap();
        let mut prepared = ptr::null_mut();
        // SAFETY: the statement ends in a zero byte, and `prepared` takes what is made of it.
        self.check(unsafe {
            sqlite::sqlite3_prepare_v2(self.0, text.as_ptr(), -1, &raw mut prepared, ptr::null_mut())
        })?;
        // SAFETY: it was prepared, and is finalized below; columns are read while its row is there.
        let (result, row) = unsafe {
            let result = sqlite::sqlite3_step(prepared);
            let columns = if result == sqlite::SQLITE_ROW { sqlite::sqlite3_column_count(prepared) } else { 0 };
            let text = |column| {
                let text = sqlite::sqlite3_column_text(prepared, column);
                let text = (!text.is_null()).then(|| CStr::from_ptr(text.cast()).to_string_lossy().into_owned());
                text.ok_or_else(|| format!("{statement}: column {column} is null"))
            };
            (result, (0..columns).map(text).collect::<Result<Vec<_>, _>>())
        };
        let said = self.check(result).and(row).map(|columns| columns.join(" "));
        // SAFETY: nobody uses it any more.
        unsafe { sqlite::sqlite3_finalize(prepared) };
        said
    }

    fn expect(&self, statement: &str, expected: &str) -> Result<(), String> {
        match self.say(statement)? {
            said if said == expected => Ok(()),
            said => Err(format!("{statement}: {said} in place of {expected}")),
        }
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        // SAFETY: it is open, and its statements are finalized.
        unsafe { sqlite::sqlite3_close(self.0) };
    }
}

fn value(row: i64) -> i64 {
    row * row % 9973
}

/// The database as the guest leaves it, and the room behind it.
pub(crate) fn image() -> Vec<u8> {
    let database = Database::open();
    let rows = format!(
        "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {ROWS} - 1) \
         INSERT INTO entry SELECT i, printf('%x', i * 7919 % {ROWS}), i * i % 9973 FROM n"
    );
    for statement in ["CREATE TABLE entry (id INTEGER PRIMARY KEY, key TEXT, value INTEGER)", &rows] {
        database.say(statement).unwrap();
    }
    let mut bytes = 0;
    // SAFETY: SQLite allocates the copy and says how long it is; it is freed after it was copied once more.
    let mut image = unsafe {
        let copy = sqlite::sqlite3_serialize(database.0, MAIN, &raw mut bytes, 0);
        assert!(!copy.is_null());
        let image = std::slice::from_raw_parts(copy, usize::try_from(bytes).unwrap()).to_vec();
        sqlite::sqlite3_free(copy.cast());
        image
    };
    assert!(image.len() < BYTES / 2, "room to grow");
    image.resize(BYTES, 0);
    image
}

/// Reads the database that lies at `address`, changes it, sorts it into an index and reads it again.
///
/// [`BYTES`] bytes from there have to be this process's memory, with what [`image`] made in it, and nobody else's.
pub(crate) fn run(address: u64) -> Result<(), String> {
    let database = Database::open();
    let memory: *mut u8 = ptr::with_exposed_provenance_mut(usize::try_from(address).unwrap());
    // The header says how many pages there are: SQLite takes it from there once it may use all of the room.
    let (size, room) = (BYTES as sqlite::sqlite3_int64, BYTES as sqlite::sqlite3_int64);
    // SAFETY: the caller's promise; the memory outlives the database, which does not own it.
    database.check(unsafe { sqlite::sqlite3_deserialize(database.0, MAIN, memory, size, room, 0) })?;
    let sum = |change: fn(i64) -> i64| (0..ROWS).map(change).sum::<i64>();
    database.expect("PRAGMA integrity_check", "ok")?;
    database.expect("SELECT count(*), sum(value) FROM entry", &format!("{ROWS} {}", sum(value)))?;
    database.say("UPDATE entry SET value = value + id WHERE id % 3 = 0")?;
    database.say("CREATE INDEX by_key ON entry (key)")?;
    for row in [0, 1, 7, ROWS / 2, ROWS - 1] {
        let expected = value(row) + if row % 3 == 0 { row } else { 0 };
        let key = row * 7919 % ROWS;
        database.expect(&format!("SELECT value FROM entry WHERE key = '{key:x}'"), &expected.to_string())?;
    }
    let changed = sum(|row| value(row) + if row % 3 == 0 { row } else { 0 });
    database.expect("SELECT sum(value) FROM entry", &changed.to_string())?;
    database.expect("PRAGMA integrity_check", "ok")
}
