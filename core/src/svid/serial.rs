//! Serial numbers: what names a certificate in records and revocations.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::SvidError;

/// The longest serial number, in bytes (RFC 5280, section 4.1.2.2).
pub const MAX_SERIAL_BYTES: usize = 20;

/// A certificate's serial number: positive, at most [`MAX_SERIAL_BYTES`] long. Written and read
/// in hexadecimal, two digits a byte.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Serial([u8; MAX_SERIAL_BYTES]);

/// A text that is not a serial number.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{value:?} is not a serial number: write 1 to 20 bytes, not all zero, as pairs of hexadecimal digits"
)]
pub struct SerialError {
    value: String,
}

impl Serial {
    /// The serial number with these big-endian bytes, leading zeros included or not.
    ///
    /// # Errors
    /// When it is longer than [`MAX_SERIAL_BYTES`] or zero.
    pub fn from_be_bytes(bytes: &[u8]) -> Result<Self, SvidError> {
        let significant = &bytes[bytes.iter().take_while(|byte| **byte == 0).count()..];
        if significant.is_empty() {
            return Err(SvidError::SerialNotPositive);
        }
        let mut padded = [0; MAX_SERIAL_BYTES];
        let length = significant.len();
        let start =
            MAX_SERIAL_BYTES.checked_sub(length).ok_or(SvidError::SerialTooLong { length })?;
        padded[start..].copy_from_slice(significant);
        Ok(Self(padded))
    }

    /// The bytes, big-endian, without leading zeros.
    pub fn as_be_bytes(&self) -> &[u8] {
        &self.0[self.0.iter().take_while(|byte| **byte == 0).count()..]
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_be_bytes().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Serial({self})")
    }
}

impl FromStr for Serial {
    type Err = SerialError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => Some(byte - b'0'),
            b'a'..=b'f' => Some(byte - b'a' + 10),
            b'A'..=b'F' => Some(byte - b'A' + 10),
            _ => None,
        };
        let (pairs, odd) = text.as_bytes().as_chunks::<2>();
        let bytes: Option<Vec<u8>> =
            pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?)).collect();
        bytes
            .filter(|bytes| odd.is_empty() && bytes.len() <= MAX_SERIAL_BYTES)
            .and_then(|bytes| Self::from_be_bytes(&bytes).ok())
            .ok_or_else(|| SerialError { value: text.to_owned() })
    }
}

impl Serialize for Serial {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Serial {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}
