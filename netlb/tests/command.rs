//! The binary itself: what needs other privileges, other processes or the real streams.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::{
    fs::{self, Permissions},
    os::unix::{fs::PermissionsExt as _, net::UnixListener, process::CommandExt as _},
    path::Path,
    process::{Command, Output, Stdio},
};

/// nobody
const UNPRIVILEGED: u32 = 65534;

fn netlb(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_netlb"));
    command.args(arguments).env_remove("NETLB_SOCKET").stdin(Stdio::null());
    command
}

/// Without privileges, whoever runs the tests. The binary may lie where others cannot go, so it is run from a copy.
fn unprivileged(directory: &Path, arguments: &[&str]) -> Output {
    let copy = directory.join("netlb");
    // By another process: what another test starts meanwhile would hold the file open for writing until it runs, and so keep this from running.
    assert!(Command::new("cp").arg(env!("CARGO_BIN_EXE_netlb")).arg(&copy).status().unwrap().success());
    fs::set_permissions(directory, Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new(copy);
    command.args(arguments).env_remove("NETLB_SOCKET").stdin(Stdio::null());
    if nix::unistd::geteuid().is_root() {
        command.uid(UNPRIVILEGED).gid(UNPRIVILEGED);
    }
    command.output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn run_without_privileges_names_the_missing_capabilities() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("netlb.toml");
    fs::write(&config, "").unwrap();
    let output = unprivileged(directory.path(), &["run", "--config", config.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(7), "{}", stderr(&output));
    assert_eq!(
        stderr(&output),
        "error: missing CAP_BPF CAP_NET_ADMIN CAP_PERFMON\n\
         hint: run netlb as root, or give its unit AmbientCapabilities=CAP_BPF CAP_NET_ADMIN CAP_PERFMON\n"
    );
}

#[test]
fn a_socket_that_is_not_permitted_is_7() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("netlb.sock");
    let _listener = UnixListener::bind(&socket).unwrap();
    fs::set_permissions(&socket, Permissions::from_mode(0o000)).unwrap();
    let output = unprivileged(directory.path(), &["svc", "list", "--socket", socket.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(7), "{}", stderr(&output));
    assert_eq!(
        stderr(&output),
        format!(
            "error: cannot reach netlb at {}: permission denied\nhint: the socket is for root and its group; try sudo\n",
            socket.display()
        )
    );
}

#[test]
fn run_refuses_a_directory_that_is_not_on_a_bpf_file_system() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).display().to_string();
    fs::write(at("netlb.toml"), "").unwrap();
    let arguments = [
        "run",
        "--config",
        &at("netlb.toml"),
        "--bpffs",
        &at("bpf"),
        "--state-dir",
        &at("state"),
        "--socket",
        &at("sock"),
    ];
    let output = netlb(&arguments).output().unwrap();
    if nix::unistd::geteuid().is_root() {
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        assert_eq!(
            stderr(&output),
            format!("error: {} is not on a BPF file system\nhint: mount -t bpf bpf /sys/fs/bpf\n", at("bpf"))
        );
    } else {
        assert_eq!(output.status.code(), Some(7), "{}", stderr(&output));
    }
    assert!(!Path::new(&at("state")).exists(), "nothing is made before it is known that it would be used");
}

#[test]
fn the_socket_may_come_from_the_environment() {
    let output = netlb(&["svc", "list"]).env("NETLB_SOCKET", "/nowhere/else.sock").output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert!(stderr(&output).contains("cannot reach netlb at /nowhere/else.sock"), "{}", stderr(&output));
}

#[test]
fn a_typo_in_a_command_is_2_with_the_nearest() {
    let output = netlb(&["statsu"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("'status'"), "{}", stderr(&output));
}

#[test]
fn cleanup_without_a_terminal_wants_to_be_told() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).display().to_string();
    drop(UnixListener::bind(at("sock")).unwrap());
    let arguments = ["cleanup", "--bpffs", &at("bpf"), "--state-dir", &at("state"), "--socket", &at("sock")];
    let output = netlb(&arguments).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("hint: pass --yes"), "{}", stderr(&output));
    assert!(Path::new(&at("sock")).exists());
}

#[test]
fn services_are_read_from_standard_input() {
    let mut command = netlb(&["apply", "-f", "-", "--socket", "/nowhere/else.sock"]);
    let mut child = command.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"[[service]]\nname = 1\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).starts_with("error: -:2:8: invalid type: integer `1`"), "{}", stderr(&output));
}

#[test]
fn version_is_printed_for_people_and_programs() {
    let version = |arguments: &[&str]| String::from_utf8(netlb(arguments).output().unwrap().stdout).unwrap();
    let number = env!("CARGO_PKG_VERSION");
    assert_eq!(version(&["version"]), format!("netlb {number}\n"));
    assert_eq!(version(&["--version"]), format!("netlb {number}\n"));
    assert_eq!(version(&["version", "-o", "json"]), format!("{{\n  \"version\": \"{number}\"\n}}\n"));
}
