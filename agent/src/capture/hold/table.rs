//! What is known of the connections that one workload wants: by their two ends, from the first packet until a moment
//! after it was carried or refused. Copies of that packet come late, and must neither be carried a second time nor
//! keep one waiting whose answer was lost.

use std::{
    collections::HashMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use hauberk_linux::capture::Opening;

/// How long what is over is kept in mind: a first packet that was sent again waits no longer to be taken.
const REMEMBERED: Duration = Duration::from_secs(2);

/// Entries for which there is room when the table is nearly empty.
const SPARE: usize = 4_096;

/// The two ends of a connection, the application's first.
pub(super) type Ends = (SocketAddr, SocketAddr);

/// `T` is told when a connection has arrived.
pub(super) struct Table<T> {
    states: HashMap<Ends, State<T>>,
    /// When what is over was last forgotten.
    swept: Instant,
}

enum State<T> {
    /// Nobody has answered it.
    Undecided(Opening),
    /// It is on its way to the listener.
    LetGo { opening: Opening, to: T },
    /// It is carried, or refused.
    Over { sequence: u32, since: Instant, refused: bool },
}

/// What is to be done about a first packet.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Todo<P> {
    /// It is a new connection, with a place among those that are served.
    Decide(P),
    /// It was let go, and may have been lost on the way.
    LetGo,
    /// It was refused, and the answer may have been lost.
    Refuse,
    /// It waits already, or was carried, or there is no place for it: then its application's kernel asks again.
    Nothing,
}

impl<T> Table<T> {
    pub(super) fn new() -> Self {
        Self { states: HashMap::new(), swept: Instant::now() }
    }

    /// A first packet has come.
    pub(super) fn take<P>(
        &mut self,
        opening: &Opening,
        place: impl FnOnce() -> Option<P>,
    ) -> Todo<P> {
        let ends = (opening.from, opening.wanted);
        match self.states.get_mut(&ends) {
            // Another attempt between the same ends, perhaps: only the newest can still succeed.
            Some(State::Undecided(before)) => {
                *before = opening.clone();
                return Todo::Nothing;
            }
            Some(State::LetGo { opening: before, .. }) => {
                *before = opening.clone();
                return Todo::LetGo;
            }
            Some(State::Over { sequence, refused, .. }) if *sequence == opening.sequence => {
                return if *refused { Todo::Refuse } else { Todo::Nothing };
            }
            Some(State::Over { .. }) | None => {}
        }
        let Some(place) = place() else { return Todo::Nothing };
        self.states.insert(ends, State::Undecided(opening.clone()));
        Todo::Decide(place)
    }

    /// It is let go: its first packet, the newest one. Nothing if it is not undecided.
    pub(super) fn let_go(&mut self, ends: Ends, to: T) -> Option<Opening> {
        match self.states.remove(&ends)? {
            State::Undecided(opening) => {
                self.states.insert(ends, State::LetGo { opening: opening.clone(), to });
                Some(opening)
            }
            other @ (State::LetGo { .. } | State::Over { .. }) => {
                self.states.insert(ends, other);
                None
            }
        }
    }

    /// It has arrived. Returns who wants it; nobody does if it was not let go.
    pub(super) fn arrived(&mut self, ends: Ends) -> Option<T> {
        match self.states.remove(&ends)? {
            State::LetGo { opening, to } => {
                self.remember(ends, opening.sequence, false);
                Some(to)
            }
            other @ (State::Undecided(_) | State::Over { .. }) => {
                self.states.insert(ends, other);
                None
            }
        }
    }

    /// It is given up. Returns what is to be refused: also one that was let go and did not arrive is not wanted any more,
    /// or gets this for an answer.
    pub(super) fn give_up(&mut self, ends: Ends) -> Option<Opening> {
        match self.states.remove(&ends)? {
            State::Undecided(opening) | State::LetGo { opening, .. } => {
                self.remember(ends, opening.sequence, true);
                Some(opening)
            }
            over @ State::Over { .. } => {
                self.states.insert(ends, over);
                None
            }
        }
    }

    fn remember(&mut self, ends: Ends, sequence: u32, refused: bool) {
        let now = Instant::now();
        if now.duration_since(self.swept) > REMEMBERED {
            self.swept = now;
            self.states.retain(|_, state| match state {
                State::Over { since, .. } => now.duration_since(*since) < REMEMBERED,
                State::Undecided(_) | State::LetGo { .. } => true,
            });
            if self.states.capacity() > SPARE && self.states.len() < self.states.capacity() / 4 {
                self.states.shrink_to(self.states.len() * 2);
            }
        }
        self.states.insert(ends, State::Over { sequence, since: now, refused });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From 10.0.0.1:40000 to 10.0.0.2:80.
    fn opening(sequence: u32) -> Opening {
        let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        packet.extend([0x9c, 0x40, 0, 80]);
        packet.extend(sequence.to_be_bytes());
        packet.extend([0, 0, 0, 0, 0x50, 2, 0x10, 0, 0, 0, 0, 0]);
        Opening::read(&packet).unwrap()
    }

    fn ends() -> Ends {
        (opening(0).from, opening(0).wanted)
    }

    fn table() -> Table<&'static str> {
        let mut table = Table::new();
        assert_eq!(table.take(&opening(1), || Some("place")), Todo::Decide("place"));
        table
    }

    fn again(table: &mut Table<&'static str>, sequence: u32) -> Todo<&'static str> {
        table.take(&opening(sequence), || Some("another place"))
    }

    #[test]
    fn one_that_waits_is_served_once_however_often_it_asks() {
        let mut table = table();
        assert_eq!(again(&mut table, 1), Todo::Nothing);
        assert_eq!(table.let_go(ends(), "me"), Some(opening(1)));
        assert_eq!(again(&mut table, 1), Todo::LetGo, "it may have been lost on its way");
        assert_eq!(table.arrived(ends()), Some("me"));
        assert_eq!(again(&mut table, 1), Todo::Nothing, "a copy that was late");
        assert_eq!(table.arrived(ends()), None, "nobody wants a second one");
    }

    #[test]
    fn of_two_attempts_between_the_same_ends_the_newest_counts() {
        let mut table = table();
        assert_eq!(again(&mut table, 2), Todo::Nothing);
        assert_eq!(table.let_go(ends(), "me"), Some(opening(2)));
        assert_eq!(again(&mut table, 3), Todo::LetGo);
        assert_eq!(table.arrived(ends()), Some("me"));
        assert_eq!(again(&mut table, 3), Todo::Nothing);
        assert_eq!(again(&mut table, 4), Todo::Decide("another place"));
    }

    #[test]
    fn a_refusal_is_repeated_and_ends_with_its_attempt() {
        let mut table = table();
        assert_eq!(table.give_up(ends()), Some(opening(1)));
        assert_eq!(table.give_up(ends()), None);
        assert_eq!(again(&mut table, 1), Todo::Refuse);
        assert_eq!(again(&mut table, 2), Todo::Decide("another place"));
        assert_eq!(table.let_go(ends(), "me"), Some(opening(2)));
        assert_eq!(table.give_up(ends()), Some(opening(2)), "it did not arrive");
        assert_eq!(again(&mut table, 2), Todo::Refuse);
    }

    #[test]
    fn without_a_place_it_asks_again() {
        let mut table = Table::<&str>::new();
        assert_eq!(table.take(&opening(1), || None::<()>), Todo::Nothing);
        assert_eq!(again(&mut table, 1), Todo::Decide("another place"));
    }
}
