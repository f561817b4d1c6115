//! `--watch`: print again whenever something changes.

use std::time::Duration;

use super::output::{Output, View};
use crate::client::ClientError;

const INTERVAL: Duration = Duration::from_secs(1);

/// Prints a view once or, watching, each time it is another one; that ends with an error only, such as a closed pipe.
pub(super) fn show<V: View + PartialEq>(
    watch: bool,
    out: &mut Output<'_>,
    mut fetch: impl FnMut() -> Result<V, ClientError>,
) -> anyhow::Result<()> {
    let mut shown = fetch()?;
    if !watch {
        return out.print(&shown);
    }
    out.print_next(&shown)?;
    loop {
        std::thread::sleep(INTERVAL);
        let now = fetch()?;
        if now != shown {
            out.print_next(&now)?;
            shown = now;
        }
    }
}
