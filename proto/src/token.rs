//! Join tokens: everything that a new machine needs to find the control plane and know it for the
//! right one, in one string.
//!
//! `hbk1.<control plane address>.<SHA-256 of the root>.<secret>`, each part base64url. The root's
//! hash is what makes first contact safe: there is no trust on first use.

use std::{fmt, str::FromStr};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

const VERSION: &str = "hbk1";

/// A join token. Shown only by [`JoinToken::reveal`].
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// `host:port` of the control plane.
    pub control_plane: String,
    /// SHA-256 of the root certificate's DER.
    pub root_sha256: [u8; 32],
    /// The one-use secret.
    pub secret: [u8; 32],
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken({}, secret redacted)", self.control_plane)
    }
}

impl JoinToken {
    /// The token as text: for the one who asked for it, and nobody else.
    #[must_use]
    pub fn reveal(&self) -> String {
        format!(
            "{VERSION}.{}.{}.{}",
            URL_SAFE_NO_PAD.encode(&self.control_plane),
            URL_SAFE_NO_PAD.encode(self.root_sha256),
            URL_SAFE_NO_PAD.encode(self.secret)
        )
    }
}

/// A text that is no join token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a join token: {0}; copy it whole, it starts with \"hbk1.\" and has four parts")]
pub struct TokenError(&'static str);

impl FromStr for JoinToken {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts: Vec<&str> = text.trim().split('.').collect();
        let [version, address, root, secret] = parts[..] else {
            return Err(TokenError("it does not have four parts"));
        };
        if version != VERSION {
            return Err(TokenError("it is of an unknown version"));
        }
        let decode =
            |part: &str, error| URL_SAFE_NO_PAD.decode(part).map_err(|_| TokenError(error));
        let bytes32 =
            |part: &str, error| decode(part, error)?.try_into().map_err(|_| TokenError(error));
        let control_plane = String::from_utf8(decode(address, "its address is damaged")?)
            .ok()
            .filter(|text| text.contains(':'))
            .ok_or(TokenError("its address is damaged"))?;
        Ok(Self {
            control_plane,
            root_sha256: bytes32(root, "its root hash is damaged")?,
            secret: bytes32(secret, "its secret is damaged")?,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_token_reads_back_and_does_not_show_its_secret() {
        let token = JoinToken {
            control_plane: "10.0.0.1:8443".to_owned(),
            root_sha256: [7; 32],
            secret: [9; 32],
        };
        assert_eq!(token.reveal().parse::<JoinToken>().unwrap(), token);
        assert!(!format!("{token:?}").contains(&URL_SAFE_NO_PAD.encode([9; 32])));
    }

    #[test]
    fn a_cut_token_is_refused_with_a_mend() {
        let token = JoinToken {
            control_plane: "cp:8443".to_owned(),
            root_sha256: [7; 32],
            secret: [9; 32],
        }
        .reveal();
        for end in 0..token.len() {
            assert!(token[..end].parse::<JoinToken>().is_err(), "{end}");
        }
    }
}
