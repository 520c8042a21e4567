//! A future that is polled only after it has asked for that, however often its task is. For what hardly ever
//! happens on a connection beside its bytes: without it, each burst of bytes would ask of everything that could
//! end the permission whether it has happened.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

/// `future`, polled when it asks.
pub(crate) struct Quietly<F> {
    future: F,
    bell: Arc<Bell>,
    waker: Waker,
    /// The task that the bell wakes.
    task: Option<Waker>,
}

/// What the future rings.
struct Bell {
    rung: AtomicBool,
    task: Mutex<Option<Waker>>,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.rung.store(true, Ordering::Release);
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(task) = task {
            task.wake();
        }
    }
}

impl<F: Future + Unpin> Quietly<F> {
    pub(crate) fn new(future: F) -> Self {
        let bell = Arc::new(Bell { rung: AtomicBool::new(true), task: Mutex::new(None) });
        Self { future, waker: bell.clone().into(), bell, task: None }
    }
}

impl<F: Future + Unpin> Future for Quietly<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = &mut *self;
        if !this.task.as_ref().is_some_and(|task| task.will_wake(cx.waker())) {
            this.task = Some(cx.waker().clone());
            *this.bell.task.lock().unwrap_or_else(PoisonError::into_inner) = this.task.clone();
        }
        // After the bell knows whom to wake: a ring in between is either seen here or wakes the task.
        if !this.bell.rung.swap(false, Ordering::Acquire) {
            return Poll::Pending;
        }
        Pin::new(&mut this.future).poll(&mut Context::from_waker(&this.waker))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn it_is_polled_when_it_has_asked_and_wakes_the_task_that_polled_last() {
        let polls = AtomicUsize::new(0);
        let (sender, mut receiver) = tokio::sync::oneshot::channel();
        let mut quietly = Quietly::new(std::future::poll_fn(|cx| {
            polls.fetch_add(1, Ordering::SeqCst);
            Pin::new(&mut receiver).poll(cx)
        }));
        let [first, last] = [Arc::new(Woken::default()), Arc::new(Woken::default())];
        for task in [&first, &first, &last] {
            let waker = task.clone().into();
            let polled = Pin::new(&mut quietly).poll(&mut Context::from_waker(&waker));
            assert!(polled.is_pending());
        }
        assert_eq!(polls.load(Ordering::SeqCst), 1, "nothing has happened since the first");
        sender.send(7).unwrap();
        assert_eq!([&first, &last].map(|task| task.0.load(Ordering::SeqCst)), [0, 1]);
        let waker = last.into();
        let polled = Pin::new(&mut quietly).poll(&mut Context::from_waker(&waker));
        assert_eq!(polled, Poll::Ready(Ok(7)));
    }
}
