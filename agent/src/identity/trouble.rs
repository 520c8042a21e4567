//! What is wrong with a node's certificate, in words for whoever is to mend it.

use std::fmt;

use hauberk_core::time::Timestamp;

use super::node::Unusable;

/// A sentence that says what is wrong, and what to do.
pub(super) struct Trouble<'a> {
    pub(super) node: &'a str,
    /// By its agent's pod, and not by tokens.
    pub(super) attested: bool,
    pub(super) why: &'a Unusable,
    pub(super) now: Timestamp,
}

impl fmt::Display for Trouble<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (now, node) = (self.now, self.node);
        match self.why {
            Unusable::Missing => write!(f, "node {node} has no certificate")?,
            Unusable::Damaged(text) => f.write_str(text)?,
            Unusable::Lapsed(credential) => write!(
                f,
                "the certificate of node {node} expired at {}, and the clock of this machine says {now}",
                credential.facts().not_after()
            )?,
            Unusable::Early(not_before) => {
                return write!(
                    f,
                    "the certificate of node {node} is not valid before {not_before}, and the clock of this \
                     machine says {now}: set the clock"
                );
            }
        }
        if self.attested {
            return f.write_str("; the control plane has to attest this agent's pod");
        }
        let anew = match self.why {
            Unusable::Lapsed(_) => {
                "the control plane renews it within its --node-renewal-grace; else join anew"
            }
            Unusable::Missing | Unusable::Damaged(_) | Unusable::Early(_) => "join anew",
        };
        write!(
            f,
            "; {anew} with a token (`hauberk token create --node {node}` on the control plane, `hauberk join \
             TOKEN` here)"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_what_is_wrong_and_what_to_do() {
        let now = Timestamp::from_unix_seconds(1_800_000_000);
        let hour = std::time::Duration::from_secs(3_600);
        let text =
            |attested, why: &Unusable| Trouble { node: "shop-01", attested, why, now }.to_string();
        let join = "join anew with a token (`hauberk token create --node shop-01` on the control plane, \
                    `hauberk join TOKEN` here)";
        let missing = "node shop-01 has no certificate; ";
        assert_eq!(text(false, &Unusable::Missing), format!("{missing}{join}"));
        let attest = "the control plane has to attest this agent's pod";
        assert_eq!(text(true, &Unusable::Missing), format!("{missing}{attest}"));
        let damaged = Unusable::Damaged("node.json is damaged".to_owned());
        assert_eq!(text(false, &damaged), format!("node.json is damaged; {join}"));
        let early = Unusable::Early(now.saturating_add(hour));
        let both = "the certificate of node shop-01 is not valid before 2027-01-15T09:00:00Z, and the clock of \
                    this machine says 2027-01-15T08:00:00Z: set the clock";
        for attested in [false, true] {
            assert_eq!(text(attested, &early), both);
        }
    }
}
