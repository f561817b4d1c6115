//! The journal: a line for each change, `CHECKSUM JSON`.
//!
//! A change is one line, so that it is read whole or not at all. Lines are written one after the other, each synced before the next one,
//! so that only the last can be cut off.

use std::io;

use serde::{Deserialize, Serialize};

use crate::spec::ServiceSpec;

/// What became of one name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Entry {
    Put(Box<ServiceSpec>),
    Remove(String),
}

/// A change as it is written.
pub(super) fn record(entries: &[Entry]) -> io::Result<Vec<u8>> {
    let json = serde_json::to_vec(entries)?;
    let mut record = format!("{:08x} ", checksum(&json)).into_bytes();
    record.extend(json);
    record.push(b'\n');
    Ok(record)
}

/// The entries of all whole lines, and how long those are. If what comes after them is more than one line that was cut off, the reason why
/// it cannot be read.
pub(super) fn read(text: &[u8]) -> Result<(Vec<Entry>, usize), String> {
    let mut entries = Vec::new();
    let mut at = 0;
    while let Some(line) = text[at..].split_inclusive(|byte| *byte == b'\n').next() {
        let Some(json) = intact(line) else {
            let rest = text[at + line.len()..].split_inclusive(|byte| *byte == b'\n');
            return match rest.filter_map(intact).next() {
                Some(_) => Err(format!("the change at byte {at} is not what was written, and others come after it")),
                None => Ok((entries, at)),
            };
        };
        let change: Vec<Entry> =
            serde_json::from_slice(json).map_err(|error| format!("the change at byte {at}: {error}"))?;
        entries.extend(change);
        at += line.len();
    }
    Ok((entries, at))
}

/// The JSON of a line that is as it was written.
fn intact(line: &[u8]) -> Option<&[u8]> {
    let (sum, json) = line.strip_suffix(b"\n")?.split_at_checked(9)?;
    let sum = std::str::from_utf8(sum).ok()?.strip_suffix(' ')?;
    (format!("{:08x}", checksum(json)) == sum).then_some(json)
}

/// CRC-32 as Ethernet has it (IEEE 802.3).
fn checksum(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut index = 0;
        while index < table.len() {
            let (mut value, mut bit) = (index as u32, 0);
            while bit < 8 {
                value = if value & 1 == 0 { value >> 1 } else { value >> 1 ^ 0xedb8_8320 };
                bit += 1;
            }
            table[index] = value;
            index += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |sum, byte| sum >> 8 ^ TABLE[((sum ^ u32::from(*byte)) & 0xff) as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_usual_one() {
        assert_eq!(checksum(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn what_is_written_is_read_up_to_where_it_was_cut_off() {
        let changes = [
            vec![Entry::Remove("a".to_owned())],
            vec![Entry::Put(Box::default()), Entry::Remove("line\nbreak".to_owned())],
        ];
        let records: Vec<_> = changes.iter().map(|change| record(change).unwrap()).collect();
        let text = records.concat();
        for cut in 0..=text.len() {
            let whole = if cut == text.len() { 2 } else { usize::from(cut >= records[0].len()) };
            let expected = (changes[..whole].concat(), records[..whole].concat().len());
            assert_eq!(read(&text[..cut]), Ok(expected), "{cut} bytes");
            // A file system may have made the file longer before it wrote into it.
            if cut > records[0].len() {
                let mut zeros = text[..cut].to_vec();
                zeros.resize(text.len(), 0);
                assert_eq!(read(&zeros).unwrap().0.len(), if cut == text.len() { 3 } else { 1 });
            }
        }
    }

    #[test]
    fn damage_before_the_last_change_is_no_cut() {
        let (one, two) = (record(&[Entry::Remove("a".to_owned())]).unwrap(), record(&[]).unwrap());
        for at in 0..one.len() {
            let mut text = [&one[..], &two, &two].concat();
            text[at] ^= 1;
            let error = read(&text).unwrap_err();
            assert!(error.contains("the change at byte 0"), "{error}");
        }
    }
}
