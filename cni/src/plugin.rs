//! The CNI specification's side: environment and standard input in, JSON out.

use std::{collections::HashMap, io::Read, io::Write, path::PathBuf, time::Duration};

use serde::Deserialize;
use serde_json::{Value, json};

use crate::{Answer, Namespaces, Question, Standing, Verb};

/// The plugin's type, which is the name of its file.
pub const PLUGIN_TYPE: &str = "hauberk-cni";

/// The versions that are spoken: results are passed on as they came.
const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// Longer than the agent tries, shorter than the runtime waits.
const PATIENCE: Duration = Duration::from_secs(45);

/// The plugin's own part of the network configuration.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Configuration {
    /// The version that the runtime speaks.
    #[serde(default)]
    pub cni_version: String,
    /// Where the agent listens.
    pub agent_socket: PathBuf,
    /// Namespaces whose pods start without asking: those that the mesh itself needs.
    #[serde(default)]
    pub exempt_namespaces: Vec<String>,
    /// What the agent knew last of the namespaces. Without it no pod starts while no agent answers.
    #[serde(default)]
    pub namespaces_file: Option<PathBuf>,
    /// What the plugins before this one made.
    #[serde(default)]
    pub prev_result: Option<Value>,
}

/// An error as the specification wants it.
struct Failure {
    code: u32,
    message: String,
    details: String,
}

impl Failure {
    fn new(code: u32, message: impl Into<String>, details: impl Into<String>) -> Self {
        Self { code, message: message.into(), details: details.into() }
    }
}

/// Does what the environment says. Returns whether it worked.
pub fn run(
    environment: impl Fn(&str) -> Option<String>,
    mut input: impl Read,
    mut output: impl Write,
) -> bool {
    let mut text = String::new();
    let outcome = match input.read_to_string(&mut text) {
        Ok(_) => act(&environment, &text),
        Err(error) => Err(Failure::new(5, "read the network configuration", error.to_string())),
    };
    let version = serde_json::from_str::<Value>(&text)
        .ok()
        .and_then(|value| value.get("cniVersion")?.as_str().map(str::to_owned))
        .unwrap_or_else(|| "1.0.0".to_owned());
    let (worked, answer) = match outcome {
        Ok(None) => (true, None),
        Ok(Some(answer)) => (true, Some(answer)),
        Err(failure) => (
            false,
            Some(json!({
                "cniVersion": version,
                "code": failure.code,
                "msg": failure.message,
                "details": failure.details,
            })),
        ),
    };
    match answer {
        None => worked,
        Some(answer) => writeln!(output, "{answer}").is_ok() && worked,
    }
}

fn act(environment: impl Fn(&str) -> Option<String>, text: &str) -> Result<Option<Value>, Failure> {
    let need = |name: &str| {
        environment(name)
            .filter(|value| !value.is_empty())
            .ok_or_else(|| Failure::new(4, format!("{name} is not set"), ""))
    };
    let command = need("CNI_COMMAND")?;
    if command == "VERSION" {
        return Ok(Some(json!({"cniVersion": "1.1.0", "supportedVersions": VERSIONS})));
    }
    // Deleting must always work: the rules went with the namespace.
    if command == "DEL" || command == "GC" {
        return Ok(None);
    }
    let configuration: Configuration = serde_json::from_str(text)
        .map_err(|error| Failure::new(6, "read the network configuration", error.to_string()))?;
    match command.as_str() {
        "ADD" => {
            let previous = configuration.prev_result.clone().ok_or_else(|| {
                let mend = "it has to stand behind the plugin that makes the pod's interface";
                Failure::new(7, "hauberk-cni is chained to nothing", mend)
            })?;
            ask(Verb::Add, &configuration, &environment, &need("CNI_NETNS")?)?;
            Ok(Some(previous))
        }
        "CHECK" => {
            ask(Verb::Check, &configuration, &environment, &need("CNI_NETNS")?)?;
            Ok(None)
        }
        // Whether pods can start at all: kubelet takes a node for unready without.
        "STATUS" => Ok(None),
        other => Err(Failure::new(4, format!("CNI_COMMAND {other:?} is not known"), "")),
    }
}

fn ask(
    verb: Verb,
    configuration: &Configuration,
    environment: impl Fn(&str) -> Option<String>,
    netns: &str,
) -> Result<(), Failure> {
    let arguments = environment("CNI_ARGS").unwrap_or_default();
    let arguments: HashMap<&str, &str> =
        arguments.split(';').filter_map(|pair| pair.split_once('=')).collect();
    let argument = |name: &str| {
        arguments.get(name).map(|value| (*value).to_owned()).ok_or_else(|| {
            let details = "only a Kubernetes container runtime says which pod it is about";
            Failure::new(4, format!("CNI_ARGS has no {name}"), details)
        })
    };
    let namespace = argument("K8S_POD_NAMESPACE")?;
    if configuration.exempt_namespaces.contains(&namespace) {
        return Ok(());
    }
    let question = Question {
        verb,
        namespace,
        name: argument("K8S_POD_NAME")?,
        uid: argument("K8S_POD_UID")?,
        netns: netns.to_owned(),
    };
    match question.ask(&configuration.agent_socket, PATIENCE) {
        Ok(Answer::Captured | Answer::Outside) => Ok(()),
        Ok(Answer::Refused { reason }) => Err(Failure::new(
            11,
            "the pod must not start unprotected",
            format!("Hauberk's agent on this node: {reason}"),
        )),
        Err(error) => {
            let why = match without_an_agent(configuration, &question.namespace) {
                Ok(()) => return Ok(()),
                Err(why) => why,
            };
            Err(Failure::new(
                11,
                "the pod must not start unprotected",
                format!(
                    "Hauberk's agent on this node does not answer at {}: {error}; see to the pods of the DaemonSet \
                     hauberk-agent; {why}",
                    configuration.agent_socket.display()
                ),
            ))
        }
    }
}

/// Whether a pod of this namespace starts while no agent answers; if not, why.
fn without_an_agent(configuration: &Configuration, namespace: &str) -> Result<(), String> {
    let Some(path) = &configuration.namespaces_file else {
        return Err("nothing says which namespaces are not in the mesh".to_owned());
    };
    let standing = Namespaces::read(path).and_then(|known| known.standing(namespace));
    match standing {
        Ok(Standing::Outside | Standing::NeverKnown) => Ok(()),
        Ok(Standing::Mesh) => Err(format!(
            "namespace {namespace} is in the mesh; if Hauberk was removed without `helm uninstall`, install it again"
        )),
        Ok(Standing::Unknown(left)) => Err(format!(
            "namespace {namespace} is newer than what the agent knew, and may be in the mesh: its pods start in {} s if no \
             agent is back by then",
            left.as_secs()
        )),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]
mod tests {
    use std::{os::unix::net::UnixListener, path::Path, thread};

    use super::*;
    use crate::{read_question, write_answer};

    const PREVIOUS: &str = r#"{"cniVersion":"1.0.0","ips":[{"address":"10.0.0.2/24"}]}"#;

    fn configuration(socket: &Path) -> String {
        format!(
            r#"{{"cniVersion":"1.0.0","name":"pods","type":"hauberk-cni","agentSocket":{socket:?},
                "exemptNamespaces":["kube-system"],"prevResult":{PREVIOUS}}}"#
        )
    }

    fn call(command: &str, namespace: &str, text: &str) -> (bool, Value) {
        let environment = |name: &str| {
            Some(match name {
                "CNI_COMMAND" => command.to_owned(),
                "CNI_NETNS" => "/run/netns/cni-1".to_owned(),
                "CNI_ARGS" => format!(
                    "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME=web;K8S_POD_UID=u-1"
                ),
                _ => return None,
            })
        };
        let mut output = Vec::new();
        let worked = run(environment, text.as_bytes(), &mut output);
        (worked, serde_json::from_slice(&output).unwrap_or(Value::Null))
    }

    fn agent(answer: Answer) -> (tempfile::TempDir, PathBuf, thread::JoinHandle<Question>) {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("agent.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let thread = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let question = read_question(&stream).unwrap();
            write_answer(&stream, &answer).unwrap();
            question
        });
        (folder, socket, thread)
    }

    #[test]
    fn a_captured_pod_starts_with_the_result_of_the_plugins_before() {
        for answer in [Answer::Captured, Answer::Outside] {
            let (_folder, socket, agent) = agent(answer);
            let (worked, result) = call("ADD", "shop", &configuration(&socket));
            assert!(worked, "{result}");
            assert_eq!(result, serde_json::from_str::<Value>(PREVIOUS).unwrap());
            let question = agent.join().unwrap();
            assert_eq!((question.uid.as_str(), question.verb), ("u-1", Verb::Add));
            assert_eq!(question.netns, "/run/netns/cni-1");
        }
    }

    #[test]
    fn a_refused_pod_does_not_start_and_is_told_why() {
        let (_folder, socket, _agent) = agent(Answer::Refused { reason: "no policy yet".into() });
        let (worked, result) = call("ADD", "shop", &configuration(&socket));
        assert!(!worked);
        assert_eq!(result["code"], 11);
        assert!(result["details"].as_str().unwrap().contains("no policy yet"), "{result}");
    }

    #[test]
    fn without_an_agent_no_pod_starts_but_exempt_ones() {
        let folder = tempfile::tempdir().unwrap();
        let text = configuration(&folder.path().join("none.sock"));
        let (worked, result) = call("ADD", "shop", &text);
        assert!(!worked);
        assert!(result["details"].as_str().unwrap().contains("hauberk-agent"), "{result}");
        assert!(call("ADD", "kube-system", &text).0);
        assert!(call("DEL", "shop", &text).0, "what is there can always be taken down");
    }

    #[test]
    fn without_an_agent_pods_start_whose_namespace_it_knew_to_be_outside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("namespaces.json");
        let mut text: Value =
            serde_json::from_str(&configuration(&folder.path().join("none.sock"))).unwrap();
        text["namespacesFile"] = json!(path);
        let text = text.to_string();
        let told = |namespace| {
            let (worked, result) = call("ADD", namespace, &text);
            (worked, result["details"].as_str().unwrap_or_default().to_owned())
        };
        let (worked, why) = told("other");
        assert!(!worked && why.contains("namespaces.json: No such file"), "{why}");
        let names = |name: &str| [name.to_owned()].into();
        Namespaces::new(names("shop"), names("other")).unwrap().write(&path).unwrap();
        assert_eq!(told("other"), (true, String::new()));
        let (worked, why) = told("shop");
        assert!(!worked && why.contains("namespace shop is in the mesh"), "{why}");
        let (worked, why) = told("new");
        assert!(!worked && why.contains("newer than what the agent knew"), "{why}");
    }

    #[test]
    fn nonsense_is_refused_with_a_code() {
        for (command, text, code) in [
            ("ADD", "{", 6),
            ("ADD", r#"{"cniVersion":"1.0.0","agentSocket":"/x"}"#, 7),
            ("ADD", r#"{"cniVersion":"1.0.0"}"#, 6),
            ("JUMP", &configuration(Path::new("/x")), 4),
        ] {
            let (worked, result) = call(command, "shop", text);
            assert!(!worked, "{command} {text}");
            assert_eq!(result["code"], code, "{result}");
        }
        let (worked, versions) = call("VERSION", "shop", "{}");
        assert!(worked && versions["supportedVersions"].as_array().unwrap().len() == 4);
    }
}
