//! Values that are written as text, read by serde with the error at the text's own place.

use std::{fmt, marker::PhantomData};

use serde::{Deserializer, de};

/// Reads a string and turns it into a value.
///
/// The conversion runs inside the visitor: an error raised there has the position of the string, one raised after it only that of the
/// list or table around.
pub(crate) fn deserialize_text<'de, D, T, E>(
    deserializer: D,
    expecting: &'static str,
    read: impl FnOnce(&str) -> Result<T, E>,
) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    E: fmt::Display,
{
    struct Text<T, F>(&'static str, F, PhantomData<T>);

    impl<T, F, R> de::Visitor<'_> for Text<T, F>
    where
        F: FnOnce(&str) -> Result<T, R>,
        R: fmt::Display,
    {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
            (self.1)(text).map_err(E::custom)
        }
    }

    deserializer.deserialize_str(Text(expecting, read, PhantomData))
}
