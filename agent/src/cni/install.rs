//! The plugin's file and its entry in the node's network configuration: put there, looked after, and taken
//! away again.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use hauberk_cni::PLUGIN_TYPE;
use serde_json::{Value, json};

/// Where things are, as this process sees them.
#[derive(Clone)]
pub(crate) struct Installation {
    /// The plugin of this version.
    pub(crate) plugin: PathBuf,
    /// Where the runtime looks for plugins.
    pub(crate) bin: PathBuf,
    /// Where the runtime looks for network configurations.
    pub(crate) configurations: PathBuf,
    /// Where the plugin finds this agent, as the host sees it.
    pub(crate) socket: PathBuf,
    /// Where the plugin finds what the agent knew last of the namespaces, as the host and this process see it.
    pub(crate) namespaces: PathBuf,
    /// Namespaces whose pods do not wait for an agent.
    pub(crate) exempt: Vec<String>,
}

impl Installation {
    /// Puts both in place if they are not. Returns whether anything was changed.
    pub(crate) fn ensure(&self) -> anyhow::Result<bool> {
        let copied = self.copy_plugin()?;
        let path = first_configuration(&self.configurations)?;
        let text = text(&path)?;
        let mut network = parse(&path, &text)?;
        let entry = json!({
            "type": PLUGIN_TYPE,
            "agentSocket": self.socket,
            "namespacesFile": self.namespaces,
            "exemptNamespaces": self.exempt,
        });
        let plugins = plugins(&mut network, &path)?;
        if plugins.last() == Some(&entry) {
            return Ok(copied);
        }
        plugins.retain(|plugin| !is_ours(plugin));
        plugins.push(entry);
        let new = prepare(&path, &network)?;
        // Another program may be at work just now: what it has written since would be lost.
        if fs::read(&path).ok().as_ref() != Some(&text) {
            drop(fs::remove_file(&new));
            bail!("{} is being changed by another program", path.display());
        }
        replace(&path, &new)?;
        Ok(true)
    }

    fn copy_plugin(&self) -> anyhow::Result<bool> {
        let to = self.bin.join(PLUGIN_TYPE);
        let bytes = fs::read(&self.plugin)
            .with_context(|| format!("read the plugin {}", self.plugin.display()))?;
        if fs::read(&to).is_ok_and(|there| there == bytes) {
            return Ok(false);
        }
        // In one step: the runtime may start it at any moment.
        let new = self.bin.join(format!(".{PLUGIN_TYPE}.new"));
        fs::write(&new, bytes)
            .and_then(|()| fs::set_permissions(&new, fs::Permissions::from_mode(0o755)))
            .and_then(|()| fs::rename(&new, &to))
            .with_context(|| format!("write the plugin {}", to.display()))?;
        Ok(true)
    }
}

/// Takes the entry out of every network configuration, and the plugin away.
pub(crate) fn uninstall(bin: &Path, configurations: &Path) -> anyhow::Result<()> {
    for path in list(configurations)? {
        let mut network = match read(&path) {
            Ok(network) => network,
            // Not ours: nobody else's damage is our business.
            Err(_) => continue,
        };
        let Ok(plugins) = plugins(&mut network, &path) else { continue };
        let before = plugins.len();
        plugins.retain(|plugin| !is_ours(plugin));
        if plugins.len() != before {
            write(&path, &network)?;
        }
    }
    match fs::remove_file(bin.join(PLUGIN_TYPE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove the plugin from {}", bin.display()))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

fn is_ours(plugin: &Value) -> bool {
    plugin.get("type").is_some_and(|kind| kind == PLUGIN_TYPE)
}

/// The runtime takes the first by name.
fn first_configuration(folder: &Path) -> anyhow::Result<PathBuf> {
    let first = list(folder)?.into_iter().next();
    let Some(first) = first else {
        bail!("there is no network configuration in {} yet", folder.display());
    };
    if first.extension().is_some_and(|end| end != "conflist") {
        bail!(
            "{} is of a single plugin, to which nothing can be chained; make it a .conflist",
            first.display()
        );
    }
    Ok(first)
}

fn list(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let read = || {
        let mut paths = Vec::new();
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let ends = ["conflist", "conf", "json"];
            if path.extension().is_some_and(|end| ends.iter().any(|known| end == *known)) {
                paths.push(path);
            }
        }
        paths.sort();
        Ok(paths)
    };
    read().map_err(|error: io::Error| {
        anyhow::Error::new(error).context(format!("read the folder {}", folder.display()))
    })
}

fn text(path: &Path) -> anyhow::Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {}", path.display()))
}

fn parse(path: &Path, text: &[u8]) -> anyhow::Result<Value> {
    serde_json::from_slice(text).with_context(|| format!("{} is not JSON", path.display()))
}

fn read(path: &Path) -> anyhow::Result<Value> {
    parse(path, &text(path)?)
}

fn plugins<'a>(network: &'a mut Value, path: &Path) -> anyhow::Result<&'a mut Vec<Value>> {
    network
        .get_mut("plugins")
        .and_then(Value::as_array_mut)
        .with_context(|| format!("{} has no plugins", path.display()))
}

fn write(path: &Path, network: &Value) -> anyhow::Result<()> {
    replace(path, &prepare(path, network)?)
}

/// Writes it beside the one that is there, under a name that no runtime reads.
fn prepare(path: &Path, network: &Value) -> anyhow::Result<PathBuf> {
    let mut text = serde_json::to_vec_pretty(network)?;
    text.push(b'\n');
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let new = path.with_file_name(format!(".{name}.hauberk"));
    let mode = fs::metadata(path).map_or(0o644, |metadata| metadata.permissions().mode());
    fs::write(&new, text)
        .and_then(|()| fs::set_permissions(&new, fs::Permissions::from_mode(mode)))
        .with_context(|| format!("write {}", new.display()))?;
    Ok(new)
}

/// In one step: the runtime may read it at any moment.
fn replace(path: &Path, new: &Path) -> anyhow::Result<()> {
    fs::rename(new, path).with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]
pub(super) mod tests {
    use super::*;

    pub(in crate::cni) fn installation(folder: &Path) -> Installation {
        let path = |name: &str| folder.join(name);
        fs::create_dir(path("bin")).unwrap();
        fs::create_dir(path("net.d")).unwrap();
        fs::write(path("plugin"), "the plugin").unwrap();
        Installation {
            plugin: path("plugin"),
            bin: path("bin"),
            configurations: path("net.d"),
            socket: "/run/hauberk/cni.sock".into(),
            namespaces: "/var/lib/hauberk/agent/namespaces.json".into(),
            exempt: vec!["kube-system".to_owned()],
        }
    }

    pub(in crate::cni) const NETWORK: &str =
        r#"{"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "ptp", "mtu": 1400}]}"#;

    #[test]
    fn the_entry_comes_last_stays_once_and_goes_without_a_trace() {
        let folder = tempfile::tempdir().unwrap();
        let installation = installation(folder.path());
        let path = installation.configurations.join("10-pods.conflist");
        fs::write(&path, NETWORK).unwrap();
        fs::write(installation.configurations.join("99-other.conflist"), NETWORK).unwrap();
        assert!(installation.ensure().unwrap());
        assert!(!installation.ensure().unwrap(), "nothing is left to do");
        let network = read(&path).unwrap();
        assert_eq!(network["plugins"][0], json!({"type": "ptp", "mtu": 1400}));
        assert_eq!(network["plugins"][1]["type"], PLUGIN_TYPE);
        assert_eq!(network["plugins"][1]["exemptNamespaces"], json!(["kube-system"]));
        assert_eq!(network["plugins"].as_array().unwrap().len(), 2);
        assert_eq!(fs::read(installation.bin.join(PLUGIN_TYPE)).unwrap(), b"the plugin");

        // Somebody else writes the network anew.
        fs::write(&path, NETWORK).unwrap();
        assert!(installation.ensure().unwrap());
        uninstall(&installation.bin, &installation.configurations).unwrap();
        assert_eq!(read(&path).unwrap(), serde_json::from_str::<Value>(NETWORK).unwrap());
        assert!(!installation.bin.join(PLUGIN_TYPE).exists());
        assert_eq!(fs::read_dir(&installation.configurations).unwrap().count(), 2);
    }

    #[test]
    fn what_cannot_be_chained_to_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let installation = installation(folder.path());
        let told =
            |installation: &Installation| format!("{:#}", installation.ensure().unwrap_err());
        assert!(told(&installation).contains("no network configuration"));
        fs::write(installation.configurations.join("10-pods.conf"), "{}").unwrap();
        assert!(told(&installation).contains("make it a .conflist"));
        fs::write(installation.configurations.join("05-pods.conflist"), "{").unwrap();
        assert!(told(&installation).contains("is not JSON"));
    }
}
