//! Values that are written as text, read by serde with the error at the text's own place.

use std::{fmt, marker::PhantomData};

use serde::{Deserializer, de};

/// Has serde write types as what they display, and read them as what they parse. The text beside a type says to whoever wrote something
/// else what was expected.
macro_rules! serde_by_text {
    ($($type:ty: $expecting:literal,)+) => {$(
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                $crate::text::deserialize_text(deserializer, $expecting, str::parse)
            }
        }
    )+};
}

pub(crate) use serde_by_text;

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
