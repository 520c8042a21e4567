//! Which backend of a service a connection goes to: of two by chance the one with fewer open connections
//! from here, and for a while none that just failed; or the one that the caller's last connection went to, where the
//! service wants that. Those that are asked first are the state's to tell.

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hauberk_core::policy::Backends;
use tokio::time::Instant;

/// How long a backend that could not be reached is left alone, while there are others.
const REST: Duration = Duration::from_secs(10);

/// What this agent knows of backends.
#[derive(Default)]
pub(crate) struct Balancer(Mutex<Loads>);

/// The backends that have open connections, and those that failed a moment ago.
#[derive(Default)]
struct Loads {
    of: HashMap<SocketAddr, Load>,
    /// Where callers stay.
    kept: HashMap<Asked, Kept>,
    swept: Option<Instant>,
}

/// Who asks for which service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Asked {
    pub(crate) service: SocketAddr,
    pub(crate) caller: IpAddr,
}

struct Kept {
    backend: SocketAddr,
    until: Instant,
}

impl Loads {
    /// Forgets backends that have rested and carry nothing. They may be gone: nobody would ask for them again.
    fn sweep(&mut self, now: Instant) {
        if self.swept.is_some_and(|at| now.saturating_duration_since(at) < REST) {
            return;
        }
        self.swept = Some(now);
        self.of.retain(|_, load| load.open > 0 || load.rests(now));
        self.kept.retain(|_, kept| kept.until > now);
    }

    fn is_fit(&self, backend: &SocketAddr, now: Instant) -> bool {
        self.of.get(backend).is_none_or(|load| !load.rests(now))
    }

    /// The backend of the caller's last connection, as long as it is one that connections may go to.
    fn kept(&self, backends: &Backends, asked: &Asked, now: Instant) -> Option<SocketAddr> {
        let kept = self.kept.get(asked).filter(|kept| kept.until > now)?.backend;
        let is_there = backends.first.contains(&kept) || backends.others.contains(&kept);
        (is_there && self.is_fit(&kept, now)).then_some(kept)
    }

    /// Of two by chance the one with fewer open connections.
    fn any(&self, backends: &Backends, now: Instant) -> Option<SocketAddr> {
        let fit_of = |backends: &BTreeSet<SocketAddr>| -> Vec<SocketAddr> {
            backends.iter().copied().filter(|backend| self.is_fit(backend, now)).collect()
        };
        let mut fit = fit_of(&backends.first);
        if fit.is_empty() {
            fit = fit_of(&backends.others);
        }
        if fit.is_empty() {
            // All of them failed: the next one to try is as good as any.
            fit = backends.first.iter().copied().collect();
        }
        let one = *fit.get(chance(fit.len())?)?;
        let other = *fit.get(chance(fit.len())?)?;
        let open = |backend: &SocketAddr| self.of.get(backend).map_or(0, |load| load.open);
        Some(if open(&other) < open(&one) { other } else { one })
    }
}

#[derive(Default)]
struct Load {
    open: usize,
    failed: Option<Instant>,
}

impl Load {
    fn rests(&self, now: Instant) -> bool {
        self.failed.is_some_and(|at| now.saturating_duration_since(at) < REST)
    }
}

/// A backend that was chosen; counts as open for as long as this lives.
pub(crate) struct Chosen {
    balancer: Arc<Balancer>,
    pub(crate) backend: SocketAddr,
}

impl Chosen {
    /// It could not be reached.
    pub(crate) fn failed(&self) {
        self.balancer.lock().of.entry(self.backend).or_default().failed = Some(Instant::now());
    }
}

impl Drop for Chosen {
    fn drop(&mut self) {
        let mut loads = self.balancer.lock();
        if let Some(load) = loads.of.get_mut(&self.backend) {
            load.open = load.open.saturating_sub(1);
            if load.open == 0 && !load.rests(Instant::now()) {
                loads.of.remove(&self.backend);
            }
        }
    }
}

impl Balancer {
    /// Nothing if there is no backend to ask.
    pub(crate) fn choose(self: &Arc<Self>, backends: &Backends, asked: Asked) -> Option<Chosen> {
        let now = Instant::now();
        let mut loads = self.lock();
        loads.sweep(now);
        let backend = match backends.affinity {
            None => loads.any(backends, now)?,
            Some(time) => {
                let kept = loads.kept(backends, &asked, now);
                let backend = kept.or_else(|| loads.any(backends, now))?;
                loads.kept.insert(asked, Kept { backend, until: now + time });
                backend
            }
        };
        loads.of.entry(backend).or_default().open += 1;
        drop(loads);
        Some(Chosen { balancer: self.clone(), backend })
    }

    /// Plain data: a panic elsewhere leaves nothing half-changed in it.
    fn lock(&self) -> MutexGuard<'_, Loads> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A number below `count`; nothing below nothing.
fn chance(count: usize) -> Option<usize> {
    let random = usize::try_from(getrandom::u32().unwrap_or(0)).unwrap_or(0);
    random.checked_rem(count)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]
mod tests {
    use super::*;

    fn set(ports: impl IntoIterator<Item = u16>) -> BTreeSet<SocketAddr> {
        ports.into_iter().map(|port| SocketAddr::from(([10, 0, 0, 1], port))).collect()
    }

    fn backends(count: u16) -> Backends {
        Backends { first: set(1..=count), ..Backends::default() }
    }

    fn asked(caller: u8) -> Asked {
        let service = SocketAddr::from(([10, 96, 0, 1], 80));
        Asked { service, caller: IpAddr::from([10, 0, 0, caller]) }
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_stays_with_its_backend_for_as_long_as_the_service_says() {
        let balancer = Arc::<Balancer>::default();
        let time = Duration::from_secs(60);
        let backends = Backends { affinity: Some(time), ..backends(20) };
        let choose = |caller| balancer.choose(&backends, asked(caller)).unwrap();
        let first = choose(1).backend;
        // Each connection begins the time anew, whatever others do.
        for _ in 0..100 {
            assert_eq!(choose(1).backend, first);
            drop(choose(2));
            tokio::time::advance(time / 2).await;
        }
        let others = (3..=250).map(|caller| choose(caller).backend);
        assert!(others.collect::<BTreeSet<_>>().len() > 15, "callers are not spread");
        // What could not be reached is left, and what is gone.
        choose(1).failed();
        let second = choose(1).backend;
        assert_ne!(second, first);
        let mut fewer = backends.clone();
        fewer.first.remove(&second);
        let third = balancer.choose(&fewer, asked(1)).unwrap().backend;
        assert_ne!(third, second);
        assert_eq!(choose(1).backend, third);
        // After that time it is anybody's again, and nothing is remembered.
        tokio::time::advance(time).await;
        let chosen = (0..100).map(|_| {
            let none = balancer.lock().kept(&backends, &asked(1), Instant::now()).is_none();
            let chosen = choose(1).backend;
            balancer.lock().kept.clear();
            (none, chosen)
        });
        let chosen: BTreeSet<_> = chosen.collect();
        assert!(chosen.iter().all(|(none, _)| *none) && chosen.len() > 5, "{chosen:?}");
        drop(choose(1));
        tokio::time::advance(time + REST).await;
        drop(balancer.choose(&Backends::default(), asked(1)));
        assert!(balancer.lock().kept.is_empty());
    }

    #[test]
    fn nobody_is_chosen_of_none() {
        let balancer = Arc::<Balancer>::default();
        assert!(balancer.choose(&Backends::default(), asked(9)).is_none());
        let far = Backends { out_of_reach: 3, ..Backends::default() };
        assert!(balancer.choose(&far, asked(9)).is_none());
    }

    #[test]
    fn open_connections_spread() {
        let balancer = Arc::<Balancer>::default();
        let open: Vec<_> =
            (0..300).map(|_| balancer.choose(&backends(3), asked(9)).unwrap()).collect();
        for backend in backends(3).first {
            let count = open.iter().filter(|chosen| chosen.backend == backend).count();
            assert!((60..=140).contains(&count), "{backend}: {count} of 300");
        }
        drop(open);
        assert!(balancer.lock().of.is_empty(), "what is closed is forgotten");
    }

    #[tokio::test(start_paused = true)]
    async fn backends_that_failed_and_are_gone_are_forgotten() {
        let balancer = Arc::<Balancer>::default();
        let long = balancer.choose(&backends(1), asked(9)).unwrap();
        for port in 2..2_000 {
            let gone = Backends { first: set([port]), ..Backends::default() };
            balancer.choose(&gone, asked(9)).unwrap().failed();
            tokio::time::advance(Duration::from_secs(1)).await;
            // Those of the last two rests at most.
            assert!(balancer.lock().of.len() <= 21, "{}", balancer.lock().of.len());
        }
        assert!(balancer.lock().of.contains_key(&long.backend), "it is open");
        drop(long);
        tokio::time::advance(REST).await;
        drop(balancer.choose(&backends(1), asked(9)).unwrap());
        assert!(balancer.lock().of.is_empty());
    }

    #[test]
    fn one_that_failed_is_left_alone_while_there_are_others() {
        let balancer = Arc::<Balancer>::default();
        let first = balancer.choose(&backends(2), asked(9)).unwrap();
        first.failed();
        for _ in 0..100 {
            assert_ne!(balancer.choose(&backends(2), asked(9)).unwrap().backend, first.backend);
        }
        let only = Backends { first: [first.backend].into(), ..Backends::default() };
        assert_eq!(balancer.choose(&only, asked(9)).unwrap().backend, first.backend);
    }

    #[test]
    fn the_others_are_asked_only_while_all_of_the_first_rest() {
        let balancer = Arc::<Balancer>::default();
        let backends = Backends { first: set(1..=2), others: set(3..=4), ..Backends::default() };
        let choose = || balancer.choose(&backends, asked(9)).unwrap();
        // However many connections they have open.
        let open: Vec<_> = (0..100).map(|_| choose()).collect();
        assert!(open.iter().all(|chosen| backends.first.contains(&chosen.backend)));
        let failed = choose();
        failed.failed();
        for _ in 0..100 {
            let next = choose().backend;
            assert!(backends.first.contains(&next) && next != failed.backend, "{next}");
        }
        choose().failed();
        for _ in 0..100 {
            let next = choose().backend;
            assert!(backends.others.contains(&next), "{next}");
        }
        for _ in 0..2 {
            choose().failed();
        }
        // Nobody is left who did not fail: again the first.
        assert!(backends.first.contains(&choose().backend));
    }
}
