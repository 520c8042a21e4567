//! Waits for the kernel to deliver what was written to an application, so that a reset that follows takes
//! none of it away: the kernel throws away what is still in its send queue when a socket is reset.

use std::time::Duration;

use hauberk_linux::socket::is_delivered;
use tokio::net::TcpStream;

/// How long an application that does not read may hold up its own reset. Without the mesh, what does not fit
/// into its receive buffer is lost at once.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(1);

/// Between two looks, doubled after each: the kernel reports room in the queue, but not an empty queue. An
/// acknowledgement that is delayed takes 40 ms.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(32);

/// Returns once the application's kernel has everything, or the time is over.
pub(crate) async fn delivered(stream: &TcpStream) {
    let delivery = async {
        let mut pause = FIRST_PAUSE;
        // A socket that cannot be asked is not waited for.
        while matches!(is_delivered(stream), Ok(false)) {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    };
    // Too late means that the rest is lost, as it would be without the mesh.
    drop(tokio::time::timeout(DELIVERY_TIMEOUT, delivery).await);
}
