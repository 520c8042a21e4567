//! One half of the plain chain: a relay without TLS, policy or records, with buffers of 256 KiB. What is
//! left to lose is the price of two relays as such.

use std::{io, net::SocketAddr};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

const BUFFER: usize = 256 * 1024;

/// Relays until the process is stopped.
pub(crate) fn run(listen: SocketAddr, to: SocketAddr) -> anyhow::Result<()> {
    crate::processes::raise_file_limit()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut tasks = Vec::new();
        for port in crate::serve::Port::ALL {
            let offset = port.offset();
            let socket = tokio::net::TcpSocket::new_v4()?;
            socket.set_reuseaddr(true)?;
            socket.bind(SocketAddr::new(listen.ip(), listen.port() + offset))?;
            let listener = socket.listen(4096)?;
            let to = SocketAddr::new(to.ip(), to.port() + offset);
            tasks.push(tokio::spawn(accept(listener, to)));
        }
        for task in tasks {
            task.await?;
        }
        anyhow::Ok(())
    })
}

async fn accept(listener: TcpListener, to: SocketAddr) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(async move {
                    // One that fails fails as the network would.
                    drop(relay(stream, to).await);
                });
            }
            Err(error) => eprintln!("accept: {error}"),
        }
    }
}

async fn relay(mut near: TcpStream, to: SocketAddr) -> io::Result<()> {
    let mut far = TcpStream::connect(to).await?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    let (mut near_read, mut near_write) = near.split();
    let (mut far_read, mut far_write) = far.split();
    tokio::try_join!(copy(&mut near_read, &mut far_write), copy(&mut far_read, &mut near_write))?;
    Ok(())
}

async fn copy(
    from: &mut tokio::net::tcp::ReadHalf<'_>,
    to: &mut tokio::net::tcp::WriteHalf<'_>,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return to.shutdown().await;
        }
        to.write_all(buffer.get(..count).unwrap_or_default()).await?;
    }
}
