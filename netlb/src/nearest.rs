//! "Did you mean": the known name nearest to a mistyped one.

/// The candidate nearest to `text`, if one is near enough to be what was meant.
pub(crate) fn nearest<'a>(text: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let folded = text.to_ascii_lowercase();
    candidates
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(&folded, &candidate.to_ascii_lowercase()), candidate))
        // A third of the letters wrong is a typo; more than that is another word.
        .filter(|(distance, candidate)| *distance <= text.len().max(candidate.len()).div_ceil(3).min(4))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typo_finds_its_word_and_another_word_finds_nothing() {
        let known = ["frontends", "backends", "algorithm", "name"];
        assert_eq!(nearest("backend", known), Some("backends"));
        assert_eq!(nearest("algoritm", known), Some("algorithm"));
        assert_eq!(nearest("weight", known), None);
    }

    #[test]
    fn a_frontend_with_one_wrong_digit_is_near() {
        assert_eq!(nearest("10.96.0.99:80/tcp", ["10.96.0.10:80/tcp", "[fd00::1]:53/udp"]), Some("10.96.0.10:80/tcp"));
    }
}
