//! A vector of series that cannot grow without bound.
//!
//! Not built on the library's `MetricVec` for two reasons: that one has no cap, and it finds
//! children by an FNV hash of the label values put end to end, so that `{"api", "180"}` and
//! `{"api1", "80"}` are one series. Here the values themselves are the key.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use prometheus::core::{Collector, Desc, Metric};
use prometheus::proto::{LabelPair, MetricFamily, MetricType};
use prometheus::{IntCounter, IntGauge, Opts, core::Describer};

/// Label value of everything over the cap.
pub const OVERFLOW: &str = "overflow";

/// Label sets a vector keeps before it starts to put new ones into [`OVERFLOW`].
pub const DEFAULT_SERIES_CAP: usize = 5_000;

/// Labels with few values, set by us, that stay exact over the cap: an operator still sees what
/// is denied and why.
const KEPT: [&str; 4] = ["direction", "decision", "reason", "flow"];

/// Pairs of labels that name a workload.
const WORKLOADS: [(&str, &str); 3] = [
    ("src_namespace", "src_workload"),
    ("dst_namespace", "dst_workload"),
    ("workload_namespace", "workload"),
];

/// A kind of metric that a [`CappedVec`] can hold.
pub trait Series: Metric + Clone + 'static {
    /// The kind, for the exposition.
    const TYPE: MetricType;

    /// A new metric that starts at zero.
    ///
    /// # Errors
    ///
    /// When the name is malformed.
    fn create(options: Opts) -> prometheus::Result<Self>;
}

impl Series for IntCounter {
    const TYPE: MetricType = MetricType::COUNTER;

    fn create(options: Opts) -> prometheus::Result<Self> {
        Self::with_opts(options)
    }
}

impl Series for IntGauge {
    const TYPE: MetricType = MetricType::GAUGE;

    fn create(options: Opts) -> prometheus::Result<Self> {
        Self::with_opts(options)
    }
}

/// A vector with at most so many label sets, and one more for each combination of the kept
/// labels. Clones share the series.
#[derive(Clone)]
pub struct CappedVec<S> {
    inner: Arc<Inner<S>>,
}

struct Inner<S> {
    desc: Desc,
    /// Makes children: name and help, no labels.
    options: Opts,
    /// Stands in where a child cannot be made; never exposed.
    unexposed: S,
    cap: usize,
    series: RwLock<SeriesMap<S>>,
}

struct SeriesMap<S> {
    exact: HashMap<Vec<String>, S>,
    overflow: HashMap<Vec<String>, S>,
}

impl<S: Series> CappedVec<S> {
    /// An empty vector.
    ///
    /// # Errors
    ///
    /// When the name or a label is malformed.
    pub fn new(options: Opts, labels: &[&str], cap: usize) -> prometheus::Result<Self> {
        let names = labels.iter().map(|name| (*name).to_owned()).collect();
        let desc = options.clone().variable_labels(names).describe()?;
        let unexposed = S::create(options.clone())?;
        let series = RwLock::new(SeriesMap { exact: HashMap::new(), overflow: HashMap::new() });
        Ok(Self { inner: Arc::new(Inner { desc, options, unexposed, cap, series }) })
    }

    /// The child for these values, in the order of the labels. Keep it: this takes a lock.
    ///
    /// A wrong number of values gives a child that is not exposed, as counting must not panic.
    #[must_use]
    pub fn with(&self, values: &[&str]) -> S {
        debug_assert_eq!(values.len(), self.inner.desc.variable_labels.len(), "label values");
        if values.len() != self.inner.desc.variable_labels.len() {
            return self.inner.unexposed.clone();
        }
        let key: Vec<String> = values.iter().map(|value| (*value).to_owned()).collect();
        {
            let series = self.inner.series.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(child) = series.exact.get(&key) {
                return child.clone();
            }
        }
        let mut series = self.inner.series.write().unwrap_or_else(PoisonError::into_inner);
        let full = series.exact.len() >= self.inner.cap && !series.exact.contains_key(&key);
        let entry = if full {
            let key = self.overflow_key(key);
            series.overflow.entry(key)
        } else {
            series.exact.entry(key)
        };
        entry.or_insert_with(|| self.inner.create()).clone()
    }

    /// Removes every series that names this workload on either end. Its children may still be
    /// counted with, and are exposed no more.
    pub fn forget(&self, namespace: &str, workload: &str) {
        let names = &self.inner.desc.variable_labels;
        let position = |wanted: &str| names.iter().position(|name| name == wanted);
        let pairs: Vec<(usize, usize)> = WORKLOADS
            .iter()
            .filter_map(|(namespace, workload)| position(namespace).zip(position(workload)))
            .collect();
        let named = |key: &[String], (first, second): (usize, usize)| {
            key.get(first).is_some_and(|value| value == namespace)
                && key.get(second).is_some_and(|value| value == workload)
        };
        let mut series = self.inner.series.write().unwrap_or_else(PoisonError::into_inner);
        series.exact.retain(|key, _| !pairs.iter().any(|pair| named(key, *pair)));
    }

    /// How many label sets are exposed.
    #[must_use]
    pub fn len(&self) -> usize {
        let series = self.inner.series.read().unwrap_or_else(PoisonError::into_inner);
        series.exact.len().saturating_add(series.overflow.len())
    }

    /// Whether nothing was counted yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn overflow_key(&self, values: Vec<String>) -> Vec<String> {
        let keep = |name: &String| KEPT.contains(&name.as_str());
        let over = |(name, value): (&String, String)| {
            if keep(name) { value } else { OVERFLOW.to_owned() }
        };
        self.inner.desc.variable_labels.iter().zip(values).map(over).collect()
    }
}

impl<S: Series> Inner<S> {
    fn create(&self) -> S {
        // The options made `unexposed`, so they are good.
        S::create(self.options.clone()).unwrap_or_else(|_| self.unexposed.clone())
    }

    fn expose(&self, key: &[String], child: &S) -> prometheus::proto::Metric {
        let pair = |(name, value): (&String, &String)| {
            let mut pair = LabelPair::default();
            pair.set_name(name.clone());
            pair.set_value(value.clone());
            pair
        };
        let mut metric = child.metric();
        metric.set_label(self.desc.variable_labels.iter().zip(key).map(pair).collect());
        metric
    }
}

impl<S: Series> Collector for CappedVec<S> {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.inner.desc]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let series = self.inner.series.read().unwrap_or_else(PoisonError::into_inner);
        let all = series.exact.iter().chain(&series.overflow);
        let mut family = MetricFamily::default();
        family.set_name(self.inner.desc.fq_name.clone());
        family.set_help(self.inner.desc.help.clone());
        family.set_field_type(S::TYPE);
        family.set_metric(all.map(|(key, child)| self.inner.expose(key, child)).collect());
        vec![family]
    }
}

impl<S> std::fmt::Debug for CappedVec<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CappedVec")
            .field("name", &self.inner.desc.fq_name)
            .field("cap", &self.inner.cap)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LABELS: [&str; 3] = ["reason", "src_namespace", "src_workload"];

    fn vector(cap: usize) -> CappedVec<IntCounter> {
        CappedVec::new(Opts::new("edges_total", "Edges."), &LABELS, cap).unwrap()
    }

    #[test]
    fn over_the_cap_names_become_overflow_and_reasons_stay() {
        let vector = vector(2);
        for workload in ["a", "b", "c", "d"] {
            vector.with(&["lock", "shop", workload]).inc();
        }
        vector.with(&["no_policy", "shop", "e"]).inc();
        assert_eq!(vector.len(), 4);
        assert_eq!(vector.with(&["lock", "shop", "a"]).get(), 1);
        assert_eq!(vector.with(&["lock", OVERFLOW, "any"]).get(), 2);
        assert_eq!(vector.with(&["no_policy", "any", "any"]).get(), 1);
    }

    #[test]
    fn a_forgotten_workload_makes_room_for_another() {
        let vector = vector(1);
        vector.with(&["lock", "shop", "a"]).inc();
        vector.forget("shop", "b");
        vector.forget("a", "shop");
        assert_eq!(vector.with(&["lock", "shop", "a"]).get(), 1);
        vector.forget("shop", "a");
        assert!(vector.is_empty());
        assert_eq!(vector.with(&["lock", "shop", "b"]).get(), 0);
        assert_eq!(vector.with(&["lock", "shop", "b"]).get(), 0);
        assert_eq!(vector.len(), 1);
    }

    #[test]
    fn values_that_read_the_same_end_to_end_are_different_series() {
        let vector = vector(10);
        vector.with(&["lock", "ab", "c"]).inc();
        assert_eq!(vector.with(&["lock", "a", "bc"]).get(), 0);
    }
}
