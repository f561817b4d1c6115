//! A repair of the object's type information.
//!
//! bpf-linker writes a Rust enum that carries data as a union, and its tag as a member at the tag's offset. The kernel has none of
//! that: a union's members begin at 0 (`btf_struct_check_meta()`), and it refuses all types for one. The types that matter are those of
//! maps, which are no enums; so the tags are moved to 0.

use object::{Object as _, ObjectSection as _};

/// Kinds of types with data behind their header (linux/btf.h): of a fixed size, or of this size for each of their members.
const INT: u32 = 1;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const FUNC_PROTO: u32 = 13;
const VAR: u32 = 14;
const DATASEC: u32 = 15;
const DECL_TAG: u32 = 17;
const ENUM64: u32 = 19;

/// Bytes of a type's header, and of a struct's or union's member.
const TYPE: usize = 12;
const MEMBER: usize = 12;

/// Moves the members of unions to offset 0. What is not understood is left to the kernel to complain of.
pub(super) fn repair(object: &mut [u8]) {
    let types = types(object);
    if let Some(types) = types.and_then(|(start, end)| object.get_mut(start..end)) {
        // Nothing left to do for types that end early.
        let _ = repair_types(types);
    }
}

/// Where the types are in the object.
fn types(object: &[u8]) -> Option<(usize, usize)> {
    let file = object::File::parse(object).ok()?;
    let (start, _) = file.section_by_name(".BTF")?.file_range()?;
    let start = usize::try_from(start).ok()?;
    // Magic number, version and flags; then the header's length, and where the types begin after it, and end.
    let field = |number: usize| word(object, start + 4 * number).map(|word| word as usize);
    let types = start + field(1)? + field(2)?;
    Some((types, types + field(3)?))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn repair_types(types: &mut [u8]) -> Option<()> {
    let mut at = 0;
    while at < types.len() {
        let info = word(types, at + 4)?;
        let (kind, count) = (info >> 24 & 0x1f, info as usize & 0xffff);
        at += TYPE;
        if kind == UNION {
            for member in 0..count {
                types.get_mut(at + member * MEMBER + 8..at + (member + 1) * MEMBER)?.fill(0);
            }
        }
        at += match kind {
            INT | VAR | DECL_TAG => 4,
            ARRAY => 12,
            STRUCT | UNION => MEMBER * count,
            ENUM | FUNC_PROTO => 8 * count,
            DATASEC | ENUM64 => 12 * count,
            _ => 0,
        };
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn members_of_unions_move_to_the_start_and_those_of_structs_stay() {
        let int = [1, INT << 24, 4, 32];
        let structure = [2, STRUCT << 24 | 2, 8, /**/ 3, 1, 0, /**/ 4, 1, 32];
        let pointer = [0, 2 << 24, 1];
        let union = |offset| [5, UNION << 24 | 2, 12, /**/ 6, 1, offset, /**/ 7, 2, 0];
        let types = |offset| words(&[&int[..], &structure, &pointer, &union(offset), &int].concat());
        let mut repaired = types(88);
        assert_eq!(repair_types(&mut repaired), Some(()));
        assert_eq!(repaired, types(0));
    }

    #[test]
    fn what_is_cut_off_is_left_alone() {
        let mut types = words(&[1, UNION << 24 | 7, 12, 6]);
        assert_eq!(repair_types(&mut types), None);
        repair(&mut []);
        repair(&mut words(&[1, 2, 3]));
    }
}
