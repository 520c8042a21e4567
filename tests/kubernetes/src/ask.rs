//! Asks the cluster: `kubectl` and `helm` as an administrator, and waiting for what they tell.

use std::{
    io::{Seek, Write},
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use serde_json::Value;

use crate::{
    Cluster,
    machine::{Machine, succeeded},
};

impl Cluster {
    /// A program of the host in the control plane's network, with an administrator's access to the
    /// cluster. To be started by [`Self::in_control`].
    #[must_use]
    pub fn control_command(&self, program: &str) -> Command {
        let mut command = Command::new(self.programs().path(program));
        command
            .env("KUBECONFIG", self.kubeconfig())
            .env("HOME", self.folder())
            .stdin(Stdio::null());
        command
    }

    /// Runs a command of [`Self::control_command`] to its end.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn in_control(&self, command: &mut Command) -> anyhow::Result<Output> {
        let output = self.control().netns()?.run(|| command.output())?;
        output.with_context(|| format!("run {command:?}"))
    }

    /// `kubectl` as an administrator: its output.
    ///
    /// # Errors
    /// If it fails; with what it wrote.
    pub fn kubectl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.in_control(self.control_command("kubectl").args(arguments))?;
        succeeded(&format!("kubectl {}", arguments.join(" ")), &output)
    }

    /// The same with `--output=json`.
    ///
    /// # Errors
    /// If it fails; with what it wrote.
    pub fn kubectl_json(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let text = self.kubectl(&[arguments, &["--output=json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("kubectl {arguments:?}: {text}"))
    }

    /// `helm` as an administrator: its output.
    ///
    /// # Errors
    /// If it fails; with what it wrote.
    pub fn helm(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.in_control(self.control_command("helm").args(arguments))?;
        succeeded(&format!("helm {}", arguments.join(" ")), &output)
    }

    /// Applies manifests.
    ///
    /// # Errors
    /// If they are refused.
    pub fn apply(&self, manifests: &str) -> anyhow::Result<String> {
        self.with_manifests(&["apply", "--filename=-"], manifests)
    }

    /// Deletes what manifests describe, and waits until it is gone.
    ///
    /// # Errors
    /// If it cannot be deleted.
    pub fn delete(&self, manifests: &str) -> anyhow::Result<String> {
        let arguments = ["delete", "--ignore-not-found", "--filename=-"];
        self.with_manifests(&arguments, manifests)
    }

    fn with_manifests(&self, arguments: &[&str], manifests: &str) -> anyhow::Result<String> {
        let mut file = tempfile::tempfile()?;
        file.write_all(manifests.as_bytes())?;
        file.rewind()?;
        let mut command = self.control_command("kubectl");
        let output = self.in_control(command.args(arguments).stdin(file))?;
        succeeded(&format!("kubectl {}:\n{manifests}", arguments.join(" ")), &output)
    }

    /// Runs a command in a pod: its output.
    ///
    /// # Errors
    /// If it fails; with what it wrote.
    pub fn exec(&self, namespace: &str, pod: &str, command: &[&str]) -> anyhow::Result<String> {
        let first = ["exec", "--namespace", namespace, pod, "--"];
        self.kubectl(&[first.as_slice(), command].concat())
    }

    /// Tries again until it works. Fails at once if a program of the cluster has ended.
    ///
    /// # Errors
    /// With the last error when the time is over.
    pub fn wait_until<T>(
        &self,
        what: &str,
        patience: Duration,
        mut check: impl FnMut(&Self) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let deadline = Instant::now() + patience;
        loop {
            let error = match check(self) {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            for machine in self.machines() {
                machine.check()?;
            }
            if Instant::now() > deadline {
                return Err(error.context(format!(
                    "waited {} s for {what}\n{}",
                    patience.as_secs(),
                    self.log_ends()
                )));
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// The ends of all programs' logs.
    #[must_use]
    pub fn log_ends(&self) -> String {
        let machines = self.machines();
        machines.map(Machine::log_ends).collect::<Vec<_>>().join("\n")
    }

    /// Waits until a pod is ready.
    ///
    /// # Errors
    /// If it does not become ready; with what is known of it.
    pub fn wait_pod(
        &self,
        namespace: &str,
        pod: &str,
        patience: Duration,
    ) -> anyhow::Result<Value> {
        self.wait_until(&format!("the pod {pod}"), patience, |cluster| {
            let found = cluster.kubectl_json(&["get", "pod", "--namespace", namespace, pod])?;
            if !is_ready(&found) {
                bail!("{:#}", found.get("status").unwrap_or(&Value::Null));
            }
            Ok(found)
        })
    }

    /// Waits until a node is ready.
    ///
    /// # Errors
    /// If it does not become ready; with what is known of it.
    pub fn wait_node(&self, node: &str, patience: Duration) -> anyhow::Result<()> {
        self.wait_until(node, patience, |cluster| cluster.check_node(node))
    }

    /// Looks once whether a node is ready and takes pods.
    ///
    /// # Errors
    /// If it is not, or does not; with what is known of it.
    pub fn check_node(&self, name: &str) -> anyhow::Result<()> {
        let node = self.kubectl_json(&["get", "node", name])?;
        if !is_ready(&node) || node.pointer("/spec/taints").is_some() {
            bail!("{name} is not ready: {node:#}");
        }
        Ok(())
    }
}

fn is_ready(object: &Value) -> bool {
    let conditions = object.pointer("/status/conditions").and_then(Value::as_array);
    conditions.into_iter().flatten().any(|condition| {
        condition.get("type").is_some_and(|kind| kind == "Ready")
            && condition.get("status").is_some_and(|status| status == "True")
    })
}
