//! The cluster's certificate authority, made with `openssl` for one cluster and gone with it.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context;
use serde_json::json;

use crate::{
    control::server,
    machine::{Machine, succeeded},
};

/// Where a machine has certificates and keys.
pub(crate) const PKI: &str = "/etc/kubernetes/pki";

/// An authority: a certificate and its key in a folder.
pub(crate) struct Authority {
    folder: PathBuf,
}

/// Who a certificate is for.
#[derive(Clone, Copy)]
pub(crate) struct Subject<'a> {
    /// The user, or the name of a server.
    pub(crate) name: &'a str,
    /// The group, empty if none.
    pub(crate) group: &'a str,
    /// Where a server is found; none for a client.
    pub(crate) addresses: &'a [IpAddr],
    /// What else it is called.
    pub(crate) names: &'a [&'a str],
}

impl<'a> Subject<'a> {
    /// A user of the API server.
    pub(crate) fn client(name: &'a str, group: &'a str) -> Self {
        Self { name, group, addresses: &[], names: &[] }
    }
}

impl Authority {
    /// A new one.
    pub(crate) fn create(folder: &Path, name: &str) -> anyhow::Result<Self> {
        fs::create_dir_all(folder)?;
        let authority = Self { folder: folder.to_owned() };
        let extensions = "basicConstraints = critical, CA:TRUE\n\
                          keyUsage = critical, keyCertSign, cRLSign, digitalSignature\n\
                          subjectKeyIdentifier = hash\n";
        authority.openssl(name, "", extensions, &folder.join("ca"), &[])?;
        Ok(authority)
    }

    /// Its certificate.
    pub(crate) fn certificate(&self) -> PathBuf {
        self.folder.join("ca.crt")
    }

    /// Its key.
    pub(crate) fn key(&self) -> PathBuf {
        self.folder.join("ca.key")
    }

    /// Writes a certificate and its key to `<place>.crt` and `<place>.key`.
    pub(crate) fn issue(&self, place: &Path, subject: Subject<'_>) -> anyhow::Result<()> {
        let mut extensions = String::from(
            "basicConstraints = critical, CA:FALSE\n\
             keyUsage = critical, digitalSignature, keyEncipherment\n\
             extendedKeyUsage = clientAuth, serverAuth\n\
             authorityKeyIdentifier = keyid\n",
        );
        let addresses = subject.addresses.iter().map(|address| format!("IP:{address}"));
        let names = subject.names.iter().map(|name| format!("DNS:{name}"));
        let alternatives: Vec<String> = addresses.chain(names).collect();
        if !alternatives.is_empty() {
            extensions += &format!("subjectAltName = {}\n", alternatives.join(", "));
        }
        let (certificate, key) = (self.certificate(), self.key());
        let signer = ["-CA".as_ref(), certificate.as_os_str(), "-CAkey".as_ref(), key.as_os_str()];
        self.openssl(subject.name, subject.group, &extensions, place, &signer)
    }

    /// Gives a machine what programs on it need to be clients of the API server: each a file's name, a user and a
    /// group, which may be empty. They read `/etc/kubernetes/<file>.conf`.
    pub(crate) fn introduce(
        &self,
        machine: &Machine,
        clients: &[(&str, &str, &str)],
    ) -> anyhow::Result<()> {
        for (file, user, group) in clients {
            self.issue(&machine.disk(PKI).join(file), Subject::client(user, group))?;
            let place = |name: &str| format!("{PKI}/{name}");
            let text = kubeconfig(
                &server(),
                &place("ca.crt"),
                &place(&format!("{file}.crt")),
                &place(&format!("{file}.key")),
            );
            machine.write(&format!("/etc/kubernetes/{file}.conf"), &text)?;
        }
        Ok(())
    }

    fn openssl(
        &self,
        name: &str,
        group: &str,
        extensions: &str,
        place: &Path,
        more: &[&std::ffi::OsStr],
    ) -> anyhow::Result<()> {
        let organization = if group.is_empty() { String::new() } else { format!("O = {group}\n") };
        let configuration = self.folder.join("request.cnf");
        let text = format!(
            "[req]\nprompt = no\ndistinguished_name = subject\nx509_extensions = extensions\n\
             [subject]\n{organization}CN = {name}\n[extensions]\n{extensions}"
        );
        fs::write(&configuration, text)?;
        let output = Command::new("openssl")
            .args(["req", "-x509", "-nodes", "-days", "3", "-newkey", "ec"])
            .args(["-pkeyopt", "ec_paramgen_curve:P-256", "-config"])
            .arg(&configuration)
            .arg("-keyout")
            .arg(place.with_extension("key"))
            .arg("-out")
            .arg(place.with_extension("crt"))
            .args(more)
            .output()
            .context("run openssl")?;
        succeeded(&format!("make the certificate of {name}"), &output).map(|_| ())
    }
}

/// What a user of the API server needs, as rules of RBAC in YAML.
pub(crate) fn rights(user: &str, rules: &str) -> String {
    format!(
        "apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {{name: '{user}'}}
rules:
{rules}---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {{name: '{user}'}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: '{user}'}}
subjects:
- {{apiGroup: rbac.authorization.k8s.io, kind: User, name: '{user}'}}
"
    )
}

/// A pair of keys that signs service accounts' tokens: `<place>.key` and `<place>.pub`.
pub(crate) fn signing_key(place: &Path) -> anyhow::Result<()> {
    let (private, public) = (place.with_extension("key"), place.with_extension("pub"));
    let output = Command::new("openssl")
        .args(["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out"])
        .arg(&private)
        .output()
        .context("run openssl")?;
    succeeded("make a signing key", &output)?;
    let output = Command::new("openssl")
        .args(["ec", "-pubout", "-in"])
        .arg(&private)
        .arg("-out")
        .arg(public)
        .output()
        .context("run openssl")?;
    succeeded("make a signing key", &output).map(|_| ())
}

/// What a client of the API server reads. The paths are those that the client sees.
pub(crate) fn kubeconfig(server: &str, authority: &str, certificate: &str, key: &str) -> String {
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{
            "name": "cluster",
            "cluster": {"server": server, "certificate-authority": authority},
        }],
        "users": [{
            "name": "user",
            "user": {"client-certificate": certificate, "client-key": key},
        }],
        "contexts": [{"name": "cluster", "context": {"cluster": "cluster", "user": "user"}}],
        "current-context": "cluster",
    })
    .to_string()
}
